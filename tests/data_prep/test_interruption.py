"""The same command continues a build that was killed at any point, and the result has the same bytes."""

import os
import random
import signal
import subprocess
import time
from subprocess import DEVNULL, PIPE

import pytest
from file_contents import read_tree
from forkserver import ForkedProcess, run
from published import WNIDS, tar_of


@pytest.fixture
def many_images(tmp_path, photographs):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(400):
        (root / f"{number:04d}.jpg").write_bytes(photographs[number % 30])
    return root


@pytest.fixture
def tar_of_tars(tmp_path, photographs):
    """ImageNet's train archive with 600 images."""
    inner = {}
    for wnid in WNIDS:
        inner[f"{wnid}.tar"] = tar_of({f"{wnid}_{n}.JPEG": photographs[n % 50] for n in range(200)})
    root = tmp_path / "archives"
    root.mkdir()
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    return root


def _command(source, out) -> list:
    kind = "imagenet" if source.name == "archives" else "folder"
    return ["-m", "data_prep", kind, source, out, "--shard-size", "20", "--workers", "2"]


@pytest.mark.parametrize("source", ["many_images", pytest.param("tar_of_tars", marks=pytest.mark.soak)])
def test_build_killed_at_random_times_is_byte_identical(source, request, tmp_path):
    source = request.getfixturevalue(source)
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    run(["-c", "pass"])  # start the fork server before measuring
    start = time.monotonic()
    assert run(_command(source, undisturbed)).returncode == 0
    duration = time.monotonic() - start
    rng = random.Random(0)
    killed = 0
    for _ in range(20):
        process = ForkedProcess(_command(source, interrupted), stdout=DEVNULL, stderr=PIPE)
        while not killed and not any(interrupted.glob("*.tar")):  # kill the first build after its first shard
            assert process.poll() is None
        try:
            process.wait(rng.uniform(0.1, 0.9) * duration if killed else 0)
            assert process.returncode == 0, process.communicate()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            if rng.random() < 0.5 and not (interrupted / "manifest.json").exists():
                _truncate_a_finished_shard(interrupted)
    assert killed
    assert run(_command(source, interrupted)).returncode == 0
    assert read_tree(interrupted) == read_tree(undisturbed)


def _truncate_a_finished_shard(directory) -> None:
    """Simulate a power failure, which may keep a file's name and lose its content."""
    for path in sorted(directory.glob("*.tar"))[:1]:
        with open(path, "r+b") as file:
            file.truncate(1000)


def _start_with_workers(command) -> tuple[ForkedProcess, list[str]]:
    process = ForkedProcess(command, stdout=PIPE, stderr=PIPE)
    workers: list[str] = []
    while len(workers) < 2 and process.poll() is None:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = file.read().split()
    return process, workers


def test_killed_worker_stops_the_build_with_exit_code_75(many_images, tmp_path):
    out = tmp_path / "shards"
    process, workers = _start_with_workers(_command(many_images, out))
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "worker" in errors and "signal 9" in errors and "Traceback" not in errors
    assert not (out / "manifest.json").exists() and not list(out.glob(".build/*.tmp"))
    assert run(_command(many_images, out)).returncode == 0


def test_sigterm_ends_every_process_with_exit_code_75(many_images, tmp_path):
    process, workers = _start_with_workers(_command(many_images, tmp_path / "shards"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "same command" in errors
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def test_source_that_changes_during_the_build_stops_it(many_images, tmp_path, data_prep):
    out = tmp_path / "shards"
    process = ForkedProcess(_command(many_images, out), stdout=DEVNULL, stderr=PIPE)
    while not (out / ".build" / "build.json").exists() and process.poll() is None:
        pass
    for path in many_images.iterdir():
        path.write_bytes(b"other")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and ".jpg: has changed" in errors
    again = data_prep("folder", many_images, out, "--shard-size", "20")
    assert again.returncode == 2 and "other files" in again.stderr


def test_unfinished_build_continues_only_with_the_same_options(many_images, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", many_images, out, "--task-index", 0, "--num-tasks", 2)
    done = data_prep("folder", many_images, out, "--seed", 1)
    assert done.returncode == 2 and "seed 0, not 1" in done.stderr


def test_second_build_of_a_directory_is_a_user_error(many_images, tmp_path):
    out = tmp_path / "shards"
    first = ForkedProcess(_command(many_images, out), stdout=DEVNULL, stderr=DEVNULL)
    while not (out / ".build" / "lock").exists() and first.poll() is None:
        pass
    second = run(_command(many_images, out))
    assert first.wait() == 0
    assert (second.returncode, "another process" in second.stderr) in [(2, True), (0, False)]
