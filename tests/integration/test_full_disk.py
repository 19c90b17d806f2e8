"""A disk that fills up while a run trains: one line, exit 2, the checkpoints before are whole."""

import os

from runs import Run

from pipeline.train import checkpoint

SETTINGS = {"train__steps": 60, "train__checkpoint_every": 20, "train__keep_checkpoints": 2}


def fill(disk, left=0):
    with open(disk / "filler", "wb") as filler:
        while True:
            try:
                os.write(filler.fileno(), bytes(2**16))
            except OSError:
                break
        filler.truncate(filler.tell() - left)


def test_a_full_disk_stops_all_ranks_with_one_line_and_no_logged_line_is_lost_when_there_is_room(
    shards, small_disk, other_run
):
    disk = small_disk(64)
    run = Run(shards, disk / "run")
    checkpoints = run.directory / "checkpoints"
    process = run.start_paused(2, "step 22", **SETTINGS)
    fill(disk)  # the metrics of a few steps still fit into what their last block has left
    run.go()
    assert process.wait(60) == 2, run.output.read_text()[-4000:]
    said = run.output.read_text()
    assert said.count("pipeline: error: ") == 1 and "make room" in said and "Traceback" not in said
    whole = checkpoint.latest_valid_checkpoint(checkpoints)
    assert whole and not list(checkpoints.glob("*.partial"))
    (disk / "filler").unlink()
    run.train(2, **SETTINGS)
    other_run.train(2, **SETTINGS)
    assert run.losses() == other_run.losses()


def test_a_checkpoint_that_finds_no_room_is_one_line_and_the_one_before_stays_whole(shards, small_disk):
    disk = small_disk(64)
    run = Run(shards, disk / "run")
    checkpoints = run.directory / "checkpoints"
    process = run.start_paused(2, "step 22", **SETTINGS, train__log_every=100)
    fill(disk, left=2**17)  # room for the picture and for the directory, not for a rank's part
    run.go()
    assert process.wait(60) == 2, run.output.read_text()[-4000:]
    said = run.output.read_text()
    assert said.count("pipeline: error: ") == 1 and "Traceback" not in said
    assert "cannot be written: " in said and "The one before is whole: make room" in said
    whole = checkpoint.latest_valid_checkpoint(checkpoints)
    assert whole.name == (checkpoints / "latest").read_text() and not list(checkpoints.glob("*.partial"))
