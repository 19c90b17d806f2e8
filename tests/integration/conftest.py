"""Fixtures for tests that start real runs."""

import fcntl
import os
import shutil
from collections.abc import Iterator

import pytest
from cluster import Cluster
from jobs import JOB_STEPS, TINY, require_slurm
from runs import DeepSpeedRun, Run


@pytest.fixture
def run(shards, tmp_path) -> Run:
    return Run(shards, tmp_path / "run")


@pytest.fixture
def deepspeed_run(shards, tmp_path) -> DeepSpeedRun:
    return DeepSpeedRun(shards, tmp_path / "run")


@pytest.fixture
def other_run(shards, tmp_path) -> Run:
    return Run(shards, tmp_path / "other")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A real Slurm cluster of two nodes."""
    require_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def uninterrupted_losses(shards, tmp_path_factory) -> list[tuple[int, float]]:
    """Losses of an uninterrupted run on two ranks without Slurm, with the settings of `Job`.

    All processes of pytest-xdist share the run.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    run = Run(shards, folder / "uninterrupted")
    run.PROGRAM = ("pipeline", "pretrain", "vith14_emae")
    with open(folder / "uninterrupted.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "uninterrupted.done").exists():
            shutil.rmtree(run.directory, ignore_errors=True)
            run.train(2, **{key.replace(".", "__"): value for key, value in TINY.items()}, train__steps=JOB_STEPS)
            (folder / "uninterrupted.done").touch()
    return run.losses()
