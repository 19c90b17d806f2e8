"""A rank that is lost, or stands still, ends the whole run within a bound; the same command continues it."""

import os
import signal
import time

import pytest
from runs import DeepSpeedRun, Run

STEPS = 60
PATIENCE = 0.3  # minutes
SETTINGS = {"train__steps": STEPS, "train__checkpoint_every": 20, "engine__timeout_minutes": PATIENCE}
SETTINGS |= {"data__timeout_s": 10, "data__retries": 0}  # less than that


LAUNCHER_WAITS = 30  # seconds that DeepSpeed's launcher gives the other ranks to end


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGSTOP, DeepSpeedRun),  # the launcher ends it, when the others have ended
        (signal.SIGKILL, Run),  # the others notice by themselves
        pytest.param(signal.SIGKILL, DeepSpeedRun, marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_stands_still_or_dies_ends_the_run_and_it_continues(shards, tmp_path, number, kind):
    run = kind(shards, tmp_path / "run")
    process = run.start_paused(2, "step 23", **SETTINGS)
    os.kill(run.ranks(process)[1], number)
    run.go()
    began = time.monotonic()
    assert process.wait(120) not in (0, None)
    assert time.monotonic() - began < 60 * PATIENCE + LAUNCHER_WAITS + 15
    if number == signal.SIGSTOP:
        stack = (run.directory / "stacks" / "rank-0.txt").read_text()
        assert "Thread" in stack and "loop.py" in stack
        assert "some rank hangs" in run.output.read_text()
    lines = Run(run.shards, run.directory).train(2, **SETTINGS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    kept = [path.name.split(".") for path in (run.directory / "stacks").iterdir()]
    assert [name[0] for name in kept if len(name) == 3] == (["rank-0"] if number == signal.SIGSTOP else [])
    assert not [name for name in kept if len(name) == 2]
