"""The examples of a data source and a task in CONTRIBUTING.md work, and are short."""

import csv
import json
from pathlib import Path

import forkserver
import pytest

from data_prep.shard_set import read_manifest
from tests.pipeline.examples import add_a_source, add_a_task

EXAMPLES = Path(__file__).parent / "examples"


def run_example(module, *arguments: str | Path) -> None:
    done = forkserver.run(["-m", module.__name__, *arguments])
    assert done.returncode == 0, done.stderr


def test_source_example_builds_a_shard_set(photographs, tmp_path):
    paths = sorted(photographs.glob("*/*"))[:6]
    listing = tmp_path / "images" / "labels.csv"
    listing.parent.mkdir()
    with open(listing, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "camera"])
        for number, path in enumerate(paths):
            (listing.parent / path.name).write_bytes(path.read_bytes())
            writer.writerow([path.name, ("even", "odd")[number % 2], "a"])
        writer.writerow(["nowhere.jpg", "odd", "b"])
    run_example(add_a_source, listing.parent, tmp_path / "out", "--workers", "1")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.num_samples == 6 and list(manifest.classes) == ["even", "odd"]
    (refused,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert "nowhere" in refused


def test_task_example_trains(shards, tmp_path):
    settings = ("train.steps=2", "train.log_every=1", "data.image_size=32", "model.depth=1", "model.width=32")
    run_example(add_a_task, shards, tmp_path / "run", *settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 <= line["rotation_top1"] <= 1 for line in lines)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("add_a_*.py")), ids=lambda path: path.stem)
def test_example_has_at_most_60_lines(path):
    assert len(path.read_text().splitlines()) <= 60
