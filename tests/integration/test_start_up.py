"""Before the first step no rank waits forever, and an error releases lock and watchdog."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from forkserver import run as fork
from runs import SMALL, environment

from pipeline.errors import StoppedEarly
from pipeline.recipe import load_recipe
from pipeline.train.run_directory import RunDirectory
from pipeline.train.run_session import RunSession

SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]
FAILING_RUN = """
import sys, threading
from pathlib import Path
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import pretrain
from pipeline.train.run_directory import RunDirectory

run, recipe = Path(sys.argv[2]), load_recipe("demo_emae", sys.argv[3:])
try:
    pretrain(recipe, [sys.argv[1]], run)
except UserError as error:
    print(error)
with RunDirectory(run).lock(recipe, timeout_s=0):
    print([thread.name for thread in threading.enumerate() if "(_watch)" in thread.name])
"""


def start_run(run, *settings):
    """Create a run directory with an empty checkpoint. Returns the checkpoint and the settings."""
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "recipe.yaml").write_text(load_recipe("demo_emae", [*SETTINGS, *settings]).to_yaml())
    return run / "checkpoints" / "step-00000004", [*SETTINGS, *settings]


def test_error_releases_the_lock_and_the_watchdog(shards, tmp_path):
    _, settings = start_run(tmp_path / "run", "train.steps=4")
    ended = fork(["-c", FAILING_RUN, shards, tmp_path / "run", *settings], timeout=120, env=environment())
    assert ended.returncode == 0, ended.stderr[-4000:]
    error, watchdogs = ended.stdout.splitlines()[-2:]
    assert "every checkpoint is damaged" in error and watchdogs == "[]", ended.stderr[-4000:]
    assert not list((tmp_path / "run" / "stacks").iterdir())


NOBODY = "192.0.2.1"
"""An address for documentation, which no host has."""


def test_single_process_ignores_a_left_over_address(run, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", NOBODY)
    monkeypatch.setenv("MASTER_PORT", "29555")
    assert len(run.train(1, train__steps=1)) == 1


@pytest.mark.parametrize(("rank", "address", "code"), [("0", NOBODY, 2), ("1", NOBODY, 75), ("1", "gone.invalid", 75)])
def test_unreachable_address_ends_a_rank_with_one_line(shards, tmp_path, rank, address, code):
    timeouts = "engine.timeout_minutes=0.04", "data.timeout_s=1", "data.retries=0"
    options = ["--data", shards, "--run", tmp_path / "run", *(f"--set={setting}" for setting in timeouts)]
    launcher = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": "29555"}
    command = ["-m", "pipeline", "pretrain", "demo_emae", *options]
    ended = fork(command, timeout=60, env=environment(**launcher))
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if address in line)
    assert "MASTER_ADDR" in line and not (tmp_path / "run").exists()


def test_signal_ends_the_wait_for_rank_0(tmp_path, kept_environment, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": NOBODY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29555")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the session's handler is installed
    done = threading.Event()

    def send() -> None:
        while not done.wait(0.2):
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    session = RunSession(RunDirectory(tmp_path / "run"), 10.0, lambda _: pytest.fail("connected"))
    try:
        with pytest.raises(StoppedEarly, match="SIGTERM"):
            session.__enter__()
    finally:
        done.set()
        sender.join()


@pytest.mark.soak
def test_storage_that_hangs_at_the_start_ends_the_rank(shards, tmp_path):
    timeouts = "engine.timeout_minutes=0.04", "data.timeout_s=1", "data.retries=0"  # times 6 during start-up
    checkpoint, settings = start_run(tmp_path / "run", "train.steps=4", *timeouts)
    os.mkfifo(checkpoint / "state.json")  # opening it waits for a writer
    options = ["--data", shards, "--run", tmp_path / "run", *(f"--set={setting}" for setting in settings)]
    command = [sys.executable, "-m", "pipeline", "pretrain", "demo_emae", *map(str, options)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3 and "engine.timeout_minutes" in ended.stderr, ended.stderr[-4000:]
    assert "read_state" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
