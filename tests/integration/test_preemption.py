"""Signals: everything is saved, exit 75; a second one ends the run at once; the last checkpoint is whole."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from runs import Run, is_alive

from pipeline.train import checkpoint

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    run = Run(shards, tmp_path_factory.mktemp("undisturbed") / "run")
    run.train(2, train__steps=STEPS, train__checkpoint_every=1000, train__log_every=3)
    return run.losses()


SETTINGS = {"train__steps": STEPS, "train__checkpoint_every": 1000, "train__log_every": 3}


def test_sigusr1_to_one_rank_saves_and_stops_and_the_run_continues_exactly(deepspeed_run, undisturbed):
    run = deepspeed_run
    process = run.start_paused(2, "step 4", **SETTINGS)
    run.signal(process, 1, signal.SIGUSR1)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    output = run.output.read_text()
    assert "stopped early by SIGUSR1, everything is saved at step 3" in output and "Traceback" not in output
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [3]
    Run(run.shards, run.directory).train(2, **SETTINGS)
    assert run.losses() == undisturbed


def test_a_signal_to_one_rank_stops_all_before_the_next_step(run):
    process = run.start_paused(2, "step 6", train__steps=STEPS, train__checkpoint_every=1000)
    run.signal(process, 1, signal.SIGTERM)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    assert (
        checkpoint.checkpoint_steps(run.directory / "checkpoints") == [5] and run.metrics()[-1]["step"] == 5
    )


def test_sigterm_while_a_checkpoint_is_written_leaves_it_whole(run):
    process = run.start_paused(2, "checkpoint 4", train__steps=STEPS, train__checkpoint_every=4)
    checkpoints = run.directory / "checkpoints"
    assert any(checkpoints.glob("*.partial/*"))
    run.signal(process, 0, signal.SIGTERM)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    newest = checkpoint.latest_valid_checkpoint(checkpoints)
    assert newest.name == (checkpoints / "latest").read_text() == checkpoint.checkpoint_name(4)
    assert not any(checkpoints.glob("*.partial"))


def test_the_same_signal_twice_at_once_is_one_signal(run):
    process = run.start_paused(1, "step 3", train__steps=STEPS)
    os.kill(process.pid, signal.SIGTERM)  # to the process, then to its group: as GNU timeout does
    run.signal(process, 0, signal.SIGTERM)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]


def test_a_second_signal_ends_the_run_at_once_and_the_last_checkpoint_is_whole(run):
    process = run.start_paused(1, "step 5", train__steps=STEPS, train__checkpoint_every=4)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive while it does something else
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert checkpoint.latest_valid_checkpoint(run.directory / "checkpoints") is not None


def test_a_signal_while_starting_up_stops_before_the_first_step(run):
    run.directory.mkdir()
    with open(run.directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # it waits for whoever holds its directory
        process = run.start(1, train__steps=STEPS)
        run.wait_for(process, lambda: "held by" in run.output.read_text())
        process.send_signal(signal.SIGTERM)
        run.wait_for(process, lambda: "SIGTERM: saving and stopping" in run.output.read_text())
    assert process.wait(120) == 75, run.output.read_text()[-4000:]
    assert run.metrics() == []


@pytest.mark.parametrize("victim", ["deepspeed", pytest.param("launch.py", marks=pytest.mark.soak)])
def test_ranks_whose_launcher_was_killed_save_and_end(deepspeed_run, victim):
    run = deepspeed_run
    process = run.start(2, train__steps=10000, train__checkpoint_every=10000)
    run.wait_for(process, lambda: len(run.metrics()) >= 2)
    ranks = run.ranks(process)
    launcher = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(process.pid if victim == "deepspeed" else launcher, signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in ranks.values()):
        assert time.monotonic() < deadline, run.output.read_text()[-4000:]
        time.sleep(0.1)
    saved = checkpoint.latest_valid_checkpoint(run.directory / "checkpoints")
    assert saved and checkpoint.read_state(saved)["step"] >= 2
    assert "stopped early by the end of its launcher" in run.output.read_text()
