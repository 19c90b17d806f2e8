"""Fixtures for tests that start real runs."""

import pytest
from cluster import Cluster
from jobs import UNDISTURBED_STEPS, Job, needs_slurm
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
def undisturbed_job(cluster, shards, tmp_path_factory) -> Job:
    """A job on two nodes that trained to its end without being disturbed."""
    job = Job(cluster, shards, tmp_path_factory.mktemp("undisturbed"), train__steps=UNDISTURBED_STEPS)
    job.train("pretrain_vith.sh")
    return job
