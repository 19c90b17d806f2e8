"""After a signal, or the death of its launcher, a run saves a checkpoint and exits with code 75."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from runs import DeepSpeedRun, Run, TorchRun, is_alive

from pipeline.train import checkpoint

STEPS = 20
FOUR_MICRO_BATCHES = {"engine__micro_batch": 2}
"""Per rank and step. A signal takes effect up to two micro batches late."""
SETTINGS = {"train__steps": STEPS, "train__checkpoint_every": 1000, "train__log_every": 3, **FOUR_MICRO_BATCHES}


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    run = Run(shards, tmp_path_factory.mktemp("uninterrupted") / "run")
    run.train(2, **SETTINGS)
    return run.losses()


def test_sigusr1_to_one_rank_saves_and_resume_is_exact(deepspeed_run, uninterrupted):
    run = deepspeed_run
    process = run.start_paused(2, "step 4", **SETTINGS)
    run.signal_paused(process, 1, signal.SIGUSR1)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    output = run.output.read_text()
    assert "stopped by SIGUSR1, saved at step 3" in output and "Traceback" not in output
    assert " WARNING rank 1] SIGUSR1: saving" in output
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [3]
    Run(run.shards, run.directory).train(2, **SETTINGS)
    assert run.losses() == uninterrupted


def test_signal_to_one_rank_stops_all_before_the_next_step(run):
    process = run.start_paused(2, "step 6", train__steps=STEPS, train__checkpoint_every=1000, **FOUR_MICRO_BATCHES)
    run.signal_paused(process, 1, signal.SIGTERM)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [5]
    assert run.metrics()[-1]["step"] == 5


def test_sigterm_during_a_checkpoint_completes_it(run):
    process = run.start_paused(2, "checkpoint 4", train__steps=STEPS, train__checkpoint_every=4)
    checkpoints = run.directory / "checkpoints"
    assert any(checkpoints.glob("*.partial/*"))
    run.signal_paused(process, 0, signal.SIGTERM)
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    newest = checkpoint.latest_valid_checkpoint(checkpoints)
    assert newest and newest.name == (checkpoints / "latest").read_text() == checkpoint.checkpoint_name(4)
    assert not any(checkpoints.glob("*.partial"))


def test_repeated_signals_save_and_stop_with_75(run):
    process = run.start_paused(1, "step 3", train__steps=STEPS)
    os.kill(process.pid, signal.SIGSTOP)  # so that several signals are pending at once
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGCONT)
    run.wait_for(process, lambda: ": saving" in run.output.read_text())
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process.pid, number)
        time.sleep(0.05)
    run.unpause()
    assert process.wait(60) == 75, run.output.read_text()[-4000:]
    assert run.output.read_text().count(": saving") == 1
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [2]


def test_signal_during_start_up_stops_before_the_first_step(run):
    run.directory.mkdir()
    with open(run.directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the run waits for the lock
        process = run.start(1, train__steps=STEPS)
        run.wait_for(process, lambda: f"{run.directory}: in use by " in run.output.read_text())
        process.send_signal(signal.SIGTERM)
        run.wait_for(process, lambda: "SIGTERM: saving" in run.output.read_text())
    assert process.wait(120) == 75, run.output.read_text()[-4000:]
    assert run.metrics() == []


@pytest.mark.parametrize(
    "victim",
    ["torchrun", pytest.param("deepspeed", marks=pytest.mark.soak), pytest.param("launch.py", marks=pytest.mark.soak)],
)
def test_ranks_save_if_their_launcher_is_killed_and_resume_is_exact(shards, tmp_path, uninterrupted, victim):
    run = (TorchRun if victim == "torchrun" else DeepSpeedRun)(shards, tmp_path / "run")
    process = run.start_paused(2, "step 4", **SETTINGS)
    pids = run.rank_pids(process)
    launcher = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher if victim == "launch.py" else process.pid, signal.SIGKILL)
    process.wait(30)
    wait_until(lambda: run.output.read_text().count("launcher died") == 2, run)
    run.unpause()
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), run)
    assert "stopped by the end of its launcher" in run.output.read_text()
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [3]
    Run(run.shards, run.directory).train(2, **SETTINGS)
    assert run.losses() == uninterrupted


def wait_until(condition, run) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, run.output.read_text()[-4000:]
        time.sleep(0.02)
