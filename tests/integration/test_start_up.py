"""Before the first step as after it: no rank waits for ever, and an error leaves nothing behind."""

import os
import subprocess
import sys

import pytest
from forkserver import run as fork
from runs import SMALL, environment

from pipeline.recipe import load_recipe

SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]
FAILS = """
import sys, threading
from pathlib import Path
from pipeline.errors import UserError
from pipeline.tasks.pretraining import pretrain
from pipeline.recipe import load_recipe
from pipeline.train.run_directory import begun

run, recipe = Path(sys.argv[2]), load_recipe("demo_emae", sys.argv[3:])
try:
    pretrain(recipe, [sys.argv[1]], run)
except UserError as error:
    print(error)
with begun(run, recipe):
    print([thread.name for thread in threading.enumerate() if "_watch" in thread.name])
"""


def begun_run(run, *settings):
    """A run directory with a checkpoint that is only a name; returns that and the settings."""
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "recipe.yaml").write_text(load_recipe("demo_emae", [*SETTINGS, *settings]).to_yaml())
    return run / "checkpoints" / "step-00000004", [*SETTINGS, *settings]


def test_a_run_that_ends_by_an_error_lets_go_of_its_directory_and_of_its_watchdog(shards, tmp_path):
    _, settings = begun_run(tmp_path / "run", "train.steps=4")
    ended = fork(["-c", FAILS, shards, tmp_path / "run", *settings], timeout=120, env=environment())
    error, watchdogs = ended.stdout.splitlines()[-2:]
    assert "every checkpoint is damaged" in error and watchdogs == "[]", ended.stderr[-4000:]
    assert not list((tmp_path / "run" / "stacks").iterdir())


@pytest.mark.soak
def test_a_storage_that_hangs_at_the_start_ends_the_rank_with_its_stacks(shards, tmp_path):
    told = "engine.timeout_minutes=0.04", "data.timeout_s=1", "data.retries=0"  # start-up: six times as long
    found, settings = begun_run(tmp_path / "run", "train.steps=4", *told)
    os.mkfifo(found / "state.json")  # nobody writes: whoever opens it waits
    options = ["--data", shards, "--run", tmp_path / "run", *(f"--set={setting}" for setting in settings)]
    command = [sys.executable, "-m", "pipeline", "pretrain", "demo_emae", *map(str, options)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3 and "some rank hangs" in ended.stderr, ended.stderr[-4000:]
    assert "read_state" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
