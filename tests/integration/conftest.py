"""Fixtures for tests that start real runs."""

import pytest
from cluster import Cluster
from jobs import JOB_STEPS, TINY, needs_slurm
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
def cluster(tmp_path_factory) -> Cluster:
    """A real Slurm cluster of two nodes."""
    needs_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def undisturbed_losses(shards, tmp_path_factory) -> list[tuple[int, float]]:
    """What two ranks log that run without Slurm and without being disturbed, with the settings of Job."""
    run = Run(shards, tmp_path_factory.mktemp("undisturbed") / "run")
    run.PROGRAM = ("pipeline", "pretrain", "vith14_emae")
    run.train(2, **{key.replace(".", "__"): value for key, value in TINY.items()}, train__steps=JOB_STEPS)
    return run.losses()
