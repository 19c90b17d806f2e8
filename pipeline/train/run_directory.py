"""The run directory: who may write there, and what was agreed on when it was made.

Invariant: one run directory is one training history. It belongs to one process group at a time, and it is
only ever continued with the recipe and the data it was begun with.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import UserError
from pipeline.io.atomic import atomic_write, write_json
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.loading import load

PACKAGES = ("shardmae", "torch", "deepspeed", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy")
FREE = {  # keys that may change when a run is continued: they say how it is done, not what is trained
    "engine.micro_batch",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.zero_stage",
    "engine.offload",
    "engine.timeout_minutes",
    "data.sources",  # their content and weights are checked against the checkpoint
    "data.read_threads",
    "data.read_ahead_mb",
    "data.timeout_s",
    "data.retries",
    "data.cache_dir",
    "data.cache_gb",
    "data.decode_threads",
    "data.prefetch",
    "data.max_undecodable",
    "data.trace",
    "evaluation.every_epochs",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "evals.knn_every",
    "evals.knn_samples",
    "train.wandb",
    "train.profile_steps",
    "guard.window",
    "guard.spike_z",
    "guard.max_consecutive_skips",
    "guard.max_rollbacks",
}
LOCK_TIMEOUT_S = 60.0  # seconds: a killed predecessor may still be dying


def check(run: Path, recipe: TrainingRecipe) -> None:
    """UserError where `run` is there and no run of this recipe. Writes nothing."""
    if not run.exists():
        return
    if not run.is_dir():
        raise UserError(
            f"--run {run}: is a file; give a directory that is new, or that holds a run to continue"
        )
    lock_run_dir = run / "recipe.yaml"
    if not lock_run_dir.exists():
        if {path.name for path in run.iterdir()} - {"lock", "recipe.yaml.new"}:
            raise UserError(
                f"--run {run}: holds something that is no run (no recipe.yaml); give a new directory"
            )
        return
    try:
        before = load(type(recipe), lock_run_dir)
    except UserError as error:
        raise UserError(
            f"--run {run}: was begun by another command or version ({error}); give a new directory"
        ) from None
    changed = {k: v for k, v in before.differences(recipe).items() if k not in FREE}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise UserError(
            f"--run {run}: was begun with another recipe: {listed}. Take that one, or a new directory"
        )


def check_continuation(checkpoint: Path, state: dict, identity: dict) -> None:
    """UserError where a checkpoint's state.json and the run that would continue it don't fit together."""
    if state["data"] != identity["data"]:
        raise UserError(
            f"{checkpoint}: was trained on another shard set than --data; give that one, or a new --run"
        )


@contextmanager
def lock_run_dir(run: Path, recipe: TrainingRecipe, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the directory, and write there at once what it is, so that a run killed from here on continues.

    UserError as `check`, and where another run is still at work there after `patience_s` seconds.
    """
    descriptor = _lock(run, timeout_s)
    try:
        check(run, recipe)  # again: the lock's last holder may have begun another recipe
        if not (run / "recipe.yaml").exists():
            atomic_write(run / "recipe.yaml", recipe.to_yaml())
        yield
    finally:
        os.close(descriptor)


def _lock(run: Path, timeout_s: float) -> int:
    """The lock's file descriptor; it is held until that is closed."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--run {run}: cannot be written: {error.strerror}; give another directory") from None
    deadline, told = time.monotonic() + timeout_s, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if time.monotonic() < deadline:
                if not told:
                    print(f"{run}: held by {holder}; waiting up to {timeout_s:.0f} s", file=sys.stderr)
                told = True
                time.sleep(0.5)
                continue
            os.close(descriptor)
            raise UserError(
                f"--run {run}: another run is at work there ({holder}); wait for it or end it"
            ) from None
        except OSError as error:
            print(
                f"warning: {run}: this file system has no locks ({error.strerror}); see to it yourself that "
                "one run at a time is at work there",
                file=sys.stderr,
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return descriptor


def describe(run: Path, recipe: TrainingRecipe, data: list[dict], **start: object) -> None:
    """Write recipe.yaml and environment.json; a run that is continued adds to the latter's list of starts.

    data: what the shard sets are. start: step, world_size, device, deepspeed: its configuration, and before:
    the last logged step and its time of the run so far, which may have got further than `step`.
    """
    atomic_write(run / "recipe.yaml", recipe.to_yaml())
    path = run / "environment.json"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **start,
        "command": sys.argv,
        "zero_stage": recipe.engine.zero_stage,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
    }
    write_json(path, {**start, "data": data, "starts": [*starts, start]})


def versions() -> dict[str, str]:
    """What is installed of the packages that a result may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the source tree this code runs from; None in an installed package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
