"""A build killed anywhere is continued by the same command and ends with the same bytes."""

import os
import random
import signal
import subprocess
import time
from subprocess import DEVNULL, PIPE

import pytest
from bytes_of import contents
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


def _command(source, out):
    kind = "imagenet" if source.name == "archives" else "folder"
    return ["-m", "data_prep", kind, source, out, "--shard-size", "20", "--workers", "2"]


@pytest.mark.parametrize("source", ["many_images", pytest.param("tar_of_tars", marks=pytest.mark.soak)])
def test_a_build_killed_at_twenty_random_moments_ends_byte_identical(source, request, tmp_path):
    source = request.getfixturevalue(source)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(["-c", "pass"])  # what starts programs is ready
    start = time.monotonic()
    assert run(_command(source, undisturbed)).returncode == 0
    whole_build = time.monotonic() - start
    moments = random.Random(0)
    killed = 0
    for _ in range(20):
        process = ForkedProcess(_command(source, disturbed), stdout=DEVNULL, stderr=PIPE)
        while not killed and not any(disturbed.glob("*.tar")):  # the first of them is in the middle
            assert process.poll() is None
        try:
            process.wait(moments.uniform(0.1, 0.9) * whole_build if killed else 0)
            assert process.returncode == 0, process.communicate()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            if moments.random() < 0.5 and (disturbed / "manifest.json").exists() is False:
                _tear_a_finished_shard(disturbed)
    assert killed
    assert run(_command(source, disturbed)).returncode == 0
    assert contents(disturbed) == contents(undisturbed)


def _tear_a_finished_shard(directory):
    """What a power cut may leave behind: a name without its content."""
    for path in sorted(directory.glob("*.tar"))[:1]:
        with open(path, "r+b") as file:
            file.truncate(1000)


def test_a_killed_worker_stops_the_build_with_one_line_and_exit_75(many_images, tmp_path):
    out = tmp_path / "shards"
    process = ForkedProcess(_command(many_images, out), stdout=PIPE, stderr=PIPE)
    workers = []
    while len(workers) < 2 and process.poll() is None:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = file.read().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "a worker was killed (signal 9" in errors and "Traceback" not in errors
    assert not (out / "manifest.json").exists() and not list(out.glob(".build/*.tmp"))
    assert run(_command(many_images, out)).returncode == 0


def test_sigterm_stops_the_build_with_exit_75_and_no_process_left(many_images, tmp_path):
    out = tmp_path / "shards"
    process = ForkedProcess(_command(many_images, out), stdout=PIPE, stderr=PIPE)
    workers = []
    while len(workers) < 2 and process.poll() is None:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = file.read().split()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues" in errors
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def test_a_source_that_changes_during_the_build_stops_it(many_images, tmp_path, data_prep):
    out = tmp_path / "shards"
    process = ForkedProcess(_command(many_images, out), stdout=DEVNULL, stderr=PIPE)
    while not (out / ".build" / "build.json").exists() and process.poll() is None:
        pass
    for path in many_images.iterdir():
        path.write_bytes(b"other")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "has changed since the build was planned" in errors
    again = data_prep("folder", many_images, out, "--shard-size", "20")
    assert again.returncode == 2 and "its source had other files" in again.stderr


def test_an_unfinished_build_is_continued_only_with_the_same_options(many_images, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", many_images, out, "--task-index", 0, "--num-tasks", 2)
    done = data_prep("folder", many_images, out, "--seed", 1)
    assert done.returncode == 2 and "an unfinished build of another set (seed 0, not 1)" in done.stderr


def test_two_builds_of_one_directory_do_not_run_at_once(many_images, tmp_path):
    out = tmp_path / "shards"
    first = ForkedProcess(_command(many_images, out), stdout=DEVNULL, stderr=DEVNULL)
    while not (out / ".build" / "lock").exists() and first.poll() is None:
        pass
    second = run(_command(many_images, out))
    assert first.wait() == 0
    assert (second.returncode, "another process" in second.stderr) in [(2, True), (0, False)]
