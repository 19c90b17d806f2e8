"""A corrupt JPEG that every check before the run has passed does not stop it."""

import hashlib
import json
import shutil

import pytest

from data_prep.shard_set import read_index, read_manifest, tar_path


@pytest.fixture
def smuggled(shards, tmp_path):
    """A shard set in which the first samples of a shard cannot be decoded and every checksum is right."""

    def make(count):
        copy = tmp_path / "smuggled"
        shutil.copytree(shards, copy)
        shard = read_manifest(copy).shards[0]
        index, path = read_index(copy, shard), tar_path(copy, shard)
        data = bytearray(path.read_bytes())
        for offset, size in zip(index.offsets[:count], index.sizes[:count], strict=True):
            scan = data.index(b"\xff\xda", offset, offset + size)
            data[scan : offset + size] = bytes(offset + size - scan)
        path.write_bytes(data)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy, index.keys[:count]

    return make


def test_a_run_trains_another_sample_in_its_place_and_says_so(run, smuggled):
    run.shards, (key,) = smuggled(1)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    lines = run.train(1, train__steps=steps)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert sum(line["replaced"] for line in lines) >= 1
    assert run.output.read_text().count(f"sample {key!r}: cannot be decoded") == 1
    (line,) = map(json.loads, (run.directory / "replaced/rank-0.jsonl").read_text().splitlines())
    assert line["sample"] == key and line["shard"].endswith(".tar")


def test_a_run_stops_when_there_are_too_many(run, smuggled):
    run.shards, keys = smuggled(3)
    steps = -(-read_manifest(run.shards).num_samples // 16)
    process = run.start(1, train__steps=steps, data__max_replaced=2)
    assert process.wait() == 2
    said = run.output.read_text()
    assert "data.max_replaced: more than 2 samples cannot be decoded" in said and "Traceback" not in said
    assert all(repr(key) in said for key in keys) and "python -m data_prep verify" in said
