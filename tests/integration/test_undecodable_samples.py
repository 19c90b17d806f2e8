"""A corrupt JPEG that all checks before training accepted does not stop the run."""

import json
import shutil

import pytest
from corrupt_samples import make_undecodable

from data_prep.shard_set import read_manifest


@pytest.fixture
def corrupted(shards, tmp_path):
    """A function that returns a shard set whose first samples cannot be decoded, and their keys."""

    def make(count):
        copy = shutil.copytree(shards, tmp_path / "corrupted")
        return copy, make_undecodable(copy, count)

    return make


def test_undecodable_sample_is_substituted_and_logged(run, corrupted):
    run.shards, (key,) = corrupted(1)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    lines = run.train(1, train__steps=steps)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert sum(line["undecodable"] for line in lines) >= 1
    assert run.output.read_text().count(f"sample {key!r}: ") == 1
    (line,) = map(json.loads, (run.directory / "replaced/rank-0.jsonl").read_text().splitlines())
    assert line["sample"] == key and line["shard"].endswith(".tar")


def test_too_many_undecodable_samples_stop_the_run(run, corrupted):
    run.shards, keys = corrupted(3)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    process = run.start(1, train__steps=steps, data__max_undecodable=2)
    assert process.wait() == 2
    output = run.output.read_text()
    assert "data.max_undecodable: " in output and "Traceback" not in output
    assert all(repr(key) in output for key in keys) and "python -m data_prep verify" in output
