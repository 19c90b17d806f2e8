"""Fixtures for tests that start real runs."""

import pytest
from cluster import Cluster
from jobs import needs_slurm
from runs import DeepSpeedRun, Run


def pytest_itemcollected(item) -> None:
    """A file's tests share a process, those on Slurm all one cluster."""
    item.add_marker(pytest.mark.xdist_group("slurm" if "slurm" in item.path.name else item.path.name))


def pytest_collection_modifyitems(items) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: "slurm" not in item.path.name)


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
