"""A corrupt JPEG that every check before the run has passed does not stop it."""

import json
import shutil

import pytest
from smuggling import smuggle

from data_prep.shard_set import read_manifest


@pytest.fixture
def smuggled(shards, tmp_path):
    """A shard set in which the first samples of a shard cannot be decoded and every checksum is right."""

    def make(count):
        copy = shutil.copytree(shards, tmp_path / "smuggled")
        return copy, smuggle(copy, count)

    return make


def test_a_run_trains_another_sample_in_its_place_and_says_so(run, smuggled):
    run.shards, (key,) = smuggled(1)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    lines = run.train(1, train__steps=steps)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert sum(line["undecodable"] for line in lines) >= 1
    assert run.output.read_text().count(f"sample {key!r}: cannot be decoded") == 1
    (line,) = map(json.loads, (run.directory / "replaced/rank-0.jsonl").read_text().splitlines())
    assert line["sample"] == key and line["shard"].endswith(".tar")


def test_a_run_stops_when_there_are_too_many(run, smuggled):
    run.shards, keys = smuggled(3)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    process = run.start(1, train__steps=steps, data__max_undecodable=2)
    assert process.wait() == 2
    said = run.output.read_text()
    assert "data.max_undecodable: more than 2 samples cannot be decoded" in said and "Traceback" not in said
    assert all(repr(key) in said for key in keys) and "python -m data_prep verify" in said
