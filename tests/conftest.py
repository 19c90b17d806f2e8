"""Fixtures that several test packages share, the order of the tests, and the time that they take."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import hypothesis
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests and runs share the cores; before torch is imported
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).parents[1]
LONG = ("test_slurm_cut_link", "test_launchers", "test_lost_ranks")  # files with one or two long tests
START_UP = "import torch, deepspeed, timm, nvidia.dali"


def pytest_addoption(parser) -> None:
    parser.addoption("--time", action="store_true", help=f"report the duration in units of `{START_UP}`")


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        return
    if config.getoption("--time"):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", START_UP], check=True, capture_output=True)
        config.start_up = time.monotonic() - began
    server = forkserver.start_server()
    config.add_cleanup(lambda: shutil.rmtree(Path(os.environ[forkserver.ADDRESS]).parent))
    config.add_cleanup(server.wait)
    config.add_cleanup(server.stdin.close)
    config.began = time.monotonic()


def pytest_unconfigure(config) -> None:
    if hasattr(config, "start_up"):
        took, unit = time.monotonic() - config.began, config.start_up
        print(f"{took:.0f} s = {took / unit:.0f} x T; T = {unit:.1f} s: python -c '{START_UP}'")


def pytest_itemcollected(item) -> None:
    """Run a file's tests in one process, for their fixtures, and those on the Slurm cluster in one.

    pytest-xdist gives a process its next group when two tests are left of the last: what is long is no such
    group.
    """
    name = item.path.stem
    group = "slurm" if "cluster" in item.fixturenames else "long" if name in LONG else name
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items) -> None:
    """Start with what takes longest and waits most: Slurm, launchers, then the other real runs."""
    first = ("slurm", *LONG, "preemption", "integration/")
    items.sort(key=lambda item: [word not in item.nodeid for word in first])


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of class folders of real JPEG photographs.

    The smallest files of IMAGENET_SAMPLE_DIR if it is set, else crops of those that ship with the test
    dependencies.
    """
    folder = tmp_path_factory.mktemp("photographs")
    sample = os.environ.get("IMAGENET_SAMPLE_DIR")
    if sample:
        for path in sorted(sorted(Path(sample).iterdir(), key=lambda path: path.stat().st_size)[:96]):
            target = folder / path.name.split("_")[0]
            target.mkdir()
            shutil.copy(path, target)
        return folder
    script = ROOT / "demo" / "photographs.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder / "crops"


def build(photographs: Path, out: Path, *options: str) -> Path:
    done = forkserver.run(["-m", "data_prep", "folder", photographs, out, *options])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def shards(photographs, tmp_path_factory) -> Path:
    """A shard set of the photographs, in several shards."""
    return build(photographs, tmp_path_factory.mktemp("shards") / "set", "--shard-size", "20")


@pytest.fixture(scope="session")
def other_shards(photographs, tmp_path_factory) -> Path:
    """The same photographs in another order."""
    return build(photographs, tmp_path_factory.mktemp("shards") / "other", "--seed", "5")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many MiB; it is gone after the test."""
    mounted = []

    def mount(mebibytes: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"mounting needs root, or `unshare -rm`: {done.stderr}"
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def kept_environment():
    """What finding and joining the ranks and listening to signals leave behind goes with the test."""
    from pipeline.distributed.collectives import destroy_process_group
    from pipeline.train.preemption import SIGNALS

    before, heard = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    os.environ["DS_ACCELERATOR"] = "cpu"
    yield
    destroy_process_group()
    signal.set_wakeup_fd(-1)
    for number, handler in heard.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def labelled_sets(photographs, tmp_path_factory) -> tuple[Path, Path]:
    """Two shard sets of small crops of six photographs, each its own class: 60 to learn from, 42 to be judged
    on."""
    folder = tmp_path_factory.mktemp("labelled")
    chosen = [sorted(path.iterdir())[0] for path in sorted(photographs.iterdir())[:6]]
    for path in chosen:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((96, 96))
        for number in range(17):
            left, top = 4 * (number % 5), 7 * (number % 4)
            part = "val" if number % 5 > 2 or number == 16 else "train"
            target = folder / part / path.parent.name / f"{path.parent.name}_{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            square.crop((left, top, left + 72, top + 72)).save(target, quality=90)
    return tuple(
        build(folder / part, folder / f"{part}-set", "--shard-size", "25") for part in ("train", "val")
    )
