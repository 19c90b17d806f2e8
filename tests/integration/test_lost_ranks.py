"""A rank that dies or hangs ends the whole run within a bound, and the same command resumes it."""

import os
import signal
import time

import pytest
from runs import DeepSpeedRun, Run, is_alive

STEPS = 30
TIMEOUT_MINUTES = 0.3
SETTINGS = {"train__steps": STEPS, "train__checkpoint_every": 10, "engine__timeout_minutes": TIMEOUT_MINUTES}
SETTINGS |= {"data__timeout_s": 10, "data__retries": 0}  # less than the timeout
LAUNCHER_TIMEOUT_S = 30  # DeepSpeed's launcher waits so long for the other ranks


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGSTOP, Run),
        (signal.SIGKILL, Run),
        pytest.param(signal.SIGSTOP, DeepSpeedRun, marks=pytest.mark.soak),
        pytest.param(signal.SIGKILL, DeepSpeedRun, marks=pytest.mark.soak),
    ],
)
def test_lost_rank_ends_the_run_and_it_resumes(shards, tmp_path, number, kind):
    run = kind(shards, tmp_path / "run")
    process = run.start_paused(2, "step 13", **SETTINGS)
    pids = run.rank_pids(process)
    os.kill(pids[1], number)
    run.unpause()
    started = time.monotonic()
    if number == signal.SIGSTOP and kind is Run:  # a launcher ends the rank after the others have ended
        run.wait_for(process, lambda: not is_alive(pids[0]))
        os.kill(pids[1], signal.SIGKILL)
    code = process.wait(120)  # of a forked run: rank 0's, unless that is 0
    assert code not in (0, None, 128 + signal.SIGKILL)
    launcher_timeout = LAUNCHER_TIMEOUT_S if kind is DeepSpeedRun else 0
    assert time.monotonic() - started < 60 * TIMEOUT_MINUTES + launcher_timeout + 15
    if number == signal.SIGSTOP:
        stacks = (run.directory / "stacks" / "rank-0.txt").read_text()
        assert "Thread" in stacks and "train_loop.py" in stacks
        assert " ERROR rank 0] no progress for " in run.output.read_text()
    lines = Run(run.shards, run.directory).train(2, **SETTINGS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = [path.name.split(".") for path in (run.directory / "stacks").iterdir()]
    assert [name[0] for name in names if len(name) == 3] == (["rank-0"] if number == signal.SIGSTOP else [])
    assert not [name for name in names if len(name) == 2]
