"""Fixtures for tests that start real runs."""

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import needs_slurm
from runs import DeepSpeedRun, Run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """A file's tests share a process, those on Slurm one cluster, which takes longest and so begins first."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            name = "slurm" if "slurm" in item.path.name else item.path.name
            item.add_marker(pytest.mark.xdist_group(name))
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
