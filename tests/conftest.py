"""Fixtures that several test packages share, the order of the tests, and their duration."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import hypothesis
import numpy as np
import pytest
from painted import paint
from PIL import Image

from pipeline.distributed.logging import setup_logging

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests and runs share the cores
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.load_profile("suite")

setup_logging()
for name in ("pipeline", "data_prep"):
    logging.getLogger(name).propagate = True  # to caplog

ROOT = Path(__file__).parents[1]
LONG = ("test_slurm_interruptions", "test_lost_ranks")
"""Files with one or two long tests."""
ESTIMATES = ("test_plan", "test_recipes", "test_papers", "test_micro_batch", "test_network_estimate")
"""Files that count the operations of the same recipes; in one process, because it counts each only once."""
START_UP = "import torch, deepspeed, timm, nvidia.dali"


def pytest_addoption(parser) -> None:
    parser.addoption("--time", action="store_true", help=f"report the duration in units of `{START_UP}`")


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        return
    if config.getoption("--time"):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", START_UP], check=True, capture_output=True)
        config.start_up = time.monotonic() - started
    server = forkserver.start_server()
    config.add_cleanup(lambda: shutil.rmtree(Path(os.environ[forkserver.ADDRESS]).parent))
    config.add_cleanup(server.wait)
    config.add_cleanup(server.stdin.close)
    config.started = time.monotonic()


def pytest_unconfigure(config) -> None:
    if hasattr(config, "start_up"):
        duration, unit = time.monotonic() - config.started, config.start_up
        print(f"{duration:.0f} s = {duration / unit:.0f} x T; T = {unit:.1f} s: python -c '{START_UP}'")


def pytest_itemcollected(item) -> None:
    """Run the tests of a file in one process, because they share fixtures, and those on the Slurm cluster in one.

    pytest-xdist gives a process its next group when two tests of the present group are left, so long tests have a
    group of their own.
    """
    name = item.path.stem
    groups = {"slurm": "cluster" in item.fixturenames, "long": name in LONG, "estimates": name in ESTIMATES}
    group = next((group for group, is_member in groups.items() if is_member), name)
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items) -> None:
    """Start with the tests that take longest and mostly wait: Slurm, launchers, then the other real runs."""
    first = ("slurm", *LONG, "preemption", "integration/", *ESTIMATES)
    items.sort(key=lambda item: [word not in item.nodeid for word in first])


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of class folders of JPEG photographs.

    They are the smallest files of IMAGENET_SAMPLE_DIR if it is set, else crops of those that test dependencies have.
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
    """Build a shard set of a folder of images."""
    built = forkserver.run(["-m", "data_prep", "folder", photographs, out, *options])
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="session")
def shards(photographs, tmp_path_factory) -> Path:
    """A shard set of the photographs, in several shards."""
    return build(photographs, tmp_path_factory.mktemp("shards") / "set", "--shard-size", "20")


@pytest.fixture(scope="session")
def other_shards(photographs, tmp_path_factory) -> Path:
    """The same photographs in another order."""
    return build(photographs, tmp_path_factory.mktemp("shards") / "other", "--seed", "5")


@pytest.fixture(scope="session")
def label_map_sets(tmp_path_factory) -> tuple[Path, Path]:
    """Two shard sets with label maps, 10 and 5 images of several sizes, painted in the colors of their labels."""
    folder = tmp_path_factory.mktemp("label-maps")
    rng = np.random.default_rng(0)
    for split, count in (("training", 10), ("validation", 5)):
        for number in range(count):
            width, height = ((90, 70), (64, 101), (150, 64), (80, 80), (47, 33))[number % 5]
            numbers = rng.integers(0, 5, (-(-height // 20), -(-width // 20)), np.uint8)
            numbers = numbers.repeat(20, 0).repeat(20, 1)[:height, :width]
            for kind, image, ending in (
                ("images", paint(numbers), "jpg"),
                ("annotations", Image.fromarray(numbers), "png"),
            ):
                path = folder / "src" / kind / split / f"{split}_{number}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, **({"quality": 95, "subsampling": 0} if ending == "jpg" else {}))
    (folder / "src" / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    for split in ("training", "validation"):
        options = ["--split", split, "--shard-size", "4"]
        built = forkserver.run(["-m", "data_prep", "ade20k", folder / "src", folder / split, *options])
        assert built.returncode == 0, built.stderr
    return folder / "training", folder / "validation"


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of the given size in MiB, until the end of the test."""
    mounted = []

    def mount(mebibytes: int) -> Path:
        mount_point = tmp_path / "disk"
        mount_point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", mount_point]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, f"mounting needs root, or `unshare -rm`: {finished.stderr}"
        mounted.append(mount_point)
        return mount_point

    yield mount
    for mount_point in mounted:
        subprocess.run(["umount", "--lazy", mount_point], check=True)


@pytest.fixture
def kept_environment():
    """Restore environment and signal handlers, and destroy the process group, after a test that trains in-process."""
    from pipeline.distributed.collectives import destroy_process_group
    from pipeline.train.preemption import SIGNALS

    environment, handlers = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    os.environ["DS_ACCELERATOR"] = "cpu"
    yield
    destroy_process_group()
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def labelled_sets(photographs, tmp_path_factory) -> tuple[Path, Path]:
    """Two shard sets of small crops of six photographs, each photograph a class: 60 to train on, 42 to evaluate on."""
    folder = tmp_path_factory.mktemp("labelled")
    chosen = [sorted(path.iterdir())[0] for path in sorted(photographs.iterdir())[:6]]
    for path in chosen:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((96, 96))
        for number in range(17):
            left, top = 4 * (number % 5), 7 * (number % 4)
            split = "val" if number % 5 > 2 or number == 16 else "train"
            target = folder / split / path.parent.name / f"{path.parent.name}_{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            square.crop((left, top, left + 72, top + 72)).save(target, quality=90)
    train, val = (build(folder / split, folder / f"{split}-set", "--shard-size", "25") for split in ("train", "val"))
    return train, val
