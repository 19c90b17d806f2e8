"""Before the first step no rank waits forever, and an error releases lock and watchdog."""

import os
import subprocess
import sys

import pytest
from forkserver import run as fork
from runs import SMALL, environment

from pipeline.recipe import load_recipe

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
