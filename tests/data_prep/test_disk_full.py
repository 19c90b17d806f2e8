"""A full disk stops a build with one line, and leaves it so that the same command finishes it."""

import os
import subprocess
import sys

import pytest
from bytes_of import contents


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


def test_a_set_that_can_not_fit_is_not_begun(disk, source, data_prep):
    _fill(disk, leave=500_000)
    done = data_prep("folder", source, disk / "out")
    assert done.returncode == 2 and "needs about 0.00 GB" in done.stderr
    assert not list((disk / "out").glob("*.tar"))


def test_a_disk_that_fills_up_during_the_build_stops_it_and_the_build_goes_on_later(
    disk, source, tmp_path, data_prep
):
    whole = tmp_path / "whole"
    arguments = ("--shard-size", "300kB", "--workers", 2)
    assert data_prep("folder", source, whole, *arguments).returncode == 0
    # A quota on the size of a file hits in the middle of a shard; nothing can foresee it.
    limited = f"ulimit -f 100; exec python -m data_prep folder {source} {disk}/out --shard-size 300kB"
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done
    assert "the disk or quota is full; make room and run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((disk / "out").glob("**/*.tmp")) and not list((disk / "out").glob("manifest.json"))
    assert data_prep("folder", source, disk / "out", *arguments).returncode == 0
    assert contents(disk / "out") == contents(whole)


def test_images_that_grow_when_re_encoded_fill_the_disk_unforeseen(disk, source, tmp_path, data_prep):
    whole, out = tmp_path / "whole", disk / "out"
    arguments = ("--shard-size", "300kB", "--quality", 100, "--workers", 2)
    assert data_prep("folder", source, whole, *arguments).returncode == 0
    _fill(disk, leave=2_500_000)
    done = data_prep("folder", source, out, *arguments)
    assert (
        done.returncode == 2 and "the disk or quota is full" in done.stderr and "Traceback" not in done.stderr
    )
    assert data_prep("verify", out).returncode == 2, "what is there is no whole set"
    (disk / "filler").unlink()
    assert not list(out.glob("**/*.tmp"))
    assert data_prep("folder", source, out, *arguments).returncode == 0
    assert contents(out) == contents(whole)


def _fill(place, leave: int) -> None:
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filler").write_bytes(bytes(free - leave))
