"""A full disk stops a build with a one-line error; the same command finishes it later."""

import os
import subprocess
import sys

import pytest
from file_contents import read_tree


@pytest.fixture
def disk(small_disk):
    return small_disk(16)


@pytest.fixture
def source(tmp_path, photographs):
    """About 2 MB of images."""
    root = tmp_path / "images"
    root.mkdir()
    number = size = 0
    while size < 2_000_000:
        data = photographs[number % 60]
        (root / f"{number:04d}.jpg").write_bytes(data)
        number, size = number + 1, size + len(data)
    return root


def test_build_does_not_start_if_the_disk_is_too_small(disk, source, data_prep):
    _fill(disk, leave=500_000)
    done = data_prep("folder", source, disk / "out")
    assert done.returncode == 2 and "GB are free" in done.stderr
    assert not list((disk / "out").glob("*.tar"))


def test_build_stopped_by_a_quota_can_be_finished(disk, source, tmp_path, data_prep):
    complete = tmp_path / "complete"
    arguments = ("--shard-size", "300kB", "--workers", 2)
    assert data_prep("folder", source, complete, *arguments).returncode == 0
    # A limit on the size of a file takes effect in the middle of a shard and cannot be predicted.
    limited = f"ulimit -f 100; exec python -m data_prep folder {source} {disk}/out --shard-size 300kB"
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done
    assert "the disk or quota is full" in done.stderr and "Traceback" not in done.stderr
    assert not list((disk / "out").glob("**/*.tmp")) and not list((disk / "out").glob("manifest.json"))
    assert data_prep("folder", source, disk / "out", *arguments).returncode == 0
    assert read_tree(disk / "out") == read_tree(complete)


def test_build_that_outgrows_its_estimate_can_be_finished(disk, source, tmp_path, data_prep):
    complete, out = tmp_path / "complete", disk / "out"
    arguments = ("--shard-size", "300kB", "--quality", 100, "--workers", 2)
    assert data_prep("folder", source, complete, *arguments).returncode == 0
    _fill(disk, leave=2_500_000)
    done = data_prep("folder", source, out, *arguments)
    assert done.returncode == 2, done
    assert "the disk or quota is full" in done.stderr and "Traceback" not in done.stderr
    assert data_prep("verify", out).returncode == 2, "an unfinished set is not complete"
    (disk / "filler").unlink()
    assert not list(out.glob("**/*.tmp"))
    assert data_prep("folder", source, out, *arguments).returncode == 0
    assert read_tree(out) == read_tree(complete)


def _fill(directory, leave: int) -> None:
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    (directory / "filler").write_bytes(bytes(free - leave))
