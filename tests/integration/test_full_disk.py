"""A disk that is full stops a run with one line and exit code 2, and earlier checkpoints stay complete."""

import os

from runs import Run

from pipeline.train import checkpoint

SETTINGS = {"train__steps": 30, "train__checkpoint_every": 10, "train__keep_checkpoints": 2}


def fill(disk, free_bytes=0):
    with open(disk / "filler", "wb") as filler:
        while True:
            try:
                os.write(filler.fileno(), bytes(2**16))
            except OSError:
                break
        filler.truncate(filler.tell() - free_bytes)


def test_full_disk_stops_all_ranks_and_loses_no_line(shards, small_disk, other_run):
    disk = small_disk(64)
    run = Run(shards, disk / "run")
    checkpoints = run.directory / "checkpoints"
    process = run.start_paused(2, "step 12", **SETTINGS)
    fill(disk)  # the lines of a few steps still fit into the last block of metrics.jsonl
    run.unpause()
    assert process.wait(60) == 2, run.output.read_text()[-4000:]
    output = run.output.read_text()
    assert output.count("pipeline: error: ") == 1 and "No space left" in output and "Traceback" not in output
    assert checkpoint.latest_valid_checkpoint(checkpoints) and not list(checkpoints.glob("*.partial"))
    (disk / "filler").unlink()
    run.train(2, **SETTINGS)
    other_run.train(2, **SETTINGS)
    assert run.losses() == other_run.losses()


def test_checkpoint_without_space_leaves_the_previous_one(shards, small_disk):
    disk = small_disk(64)
    run = Run(shards, disk / "run")
    checkpoints = run.directory / "checkpoints"
    process = run.start_paused(2, "step 12", **SETTINGS, train__log_every=100)
    fill(disk, free_bytes=2**17)  # enough for the picture and the directory, not for a rank's part
    run.unpause()
    assert process.wait(60) == 2, run.output.read_text()[-4000:]
    output = run.output.read_text()
    assert output.count("pipeline: error: ") == 1 and "Traceback" not in output
    assert f"{checkpoints}: checkpoint of step 20 cannot be written: " in output and "No space left" in output
    newest = checkpoint.latest_valid_checkpoint(checkpoints)
    assert newest and newest.name == (checkpoints / "latest").read_text()
    assert not list(checkpoints.glob("*.partial"))
