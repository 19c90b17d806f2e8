"""Fixtures for tests that start real runs."""

import pytest
from runs import Run


@pytest.fixture
def run(shards, tmp_path) -> Run:
    return Run(shards, tmp_path / "run")


@pytest.fixture
def other_run(shards, tmp_path) -> Run:
    return Run(shards, tmp_path / "other")
