"""The run directory: its paths, its lock, and the metadata of the run.

Invariant: one run directory is one training history. One job uses it at a time, and it is only resumed with the
recipe and the data that it was started with.
"""

import errno
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.io.atomic import atomic_write, write_json
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.loading import load, mutable_keys
from pipeline.recipe.training import TrainingRecipe

logger = logging.getLogger(__name__)
PACKAGES = ("shardmae", "torch", "deepspeed", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy")
LOCK_TIMEOUT_S = 60.0
"""A killed job may need this long to end."""


class RunDirectory:
    """The files of one run. No other module builds their names."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.lock_file = path / "lock"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.reconstructions = path / "reconstructions"
        self.profile = path / "profile"
        self.samples = path / "samples"  # sample traces of all ranks (data.trace)
        self.undecodable = path / "replaced"  # samples that could not be decoded, by rank
        self.bad_samples = path / "offending-samples.txt"  # samples of the steps that caused a rollback
        self.stacks = path / "stacks"  # stack traces of ranks that the watchdog ended
        self.results = path / "results.json"  # the last evaluation of a fine-tuning or linear probe
        self.predictions = path / "predictions"  # of a detector, on the validation set
        self.tokenizer = path / "tokenizer.json"  # digest of the tokenizer of a pre-training with token targets
        self.initial_weights = path / "weights.json"  # metadata of the weights that a fine-tuning started with

    def __str__(self) -> str:
        return str(self.path)

    @property
    def existing_results(self) -> Path:
        """results.json; of runs of earlier versions that have no such file, accuracy.json."""
        former = self.path / "accuracy.json"
        return self.results if self.results.exists() or not former.exists() else former

    def check(self, recipe: TrainingRecipe | ProbeRecipe) -> None:
        """Check that this is a new directory or a run of this recipe. Writes nothing.

        Raises:
            UserError: If it is something else, or a key that decides what is trained differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"--run {self}: is a file; give a new directory, or a run to resume")
        if not self.recipe_file.exists():
            if {path.name for path in self.path.iterdir()} - {"lock", "recipe.yaml.new"}:
                raise UserError(f"--run {self}: is not empty and has no recipe.yaml; give a new directory")
            return
        try:
            saved = load(type(recipe), self.recipe_file)
        except UserError as error:
            raise UserError(
                f"--run {self}: was started by another command or version ({error}); give a new directory"
            ) from error
        mutable = mutable_keys(type(recipe))
        changed = {key: pair for key, pair in saved.differences(recipe).items() if key not in mutable}
        if changed:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise UserError(
                f"--run {self}: recipe differs from the one this run was started with: {listed}; use that recipe "
                "or a new --run"
            )

    @contextmanager
    def lock(self, recipe: TrainingRecipe | ProbeRecipe, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Hold the directory, and write recipe.yaml at once if the run is new.

        Raises:
            UserError: As `check`; or if another job still holds the directory after `timeout_s`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_file.touch()
        except OSError as error:
            raise UserError(f"--run {self}: cannot be written: {error.strerror}; give another directory") from error
        lock = FileLock(self.lock_file, fallback_to_soft=False)
        try:
            self._acquire(lock, timeout_s)
            self.check(recipe)  # again: the last holder may have started another recipe
            if not self.recipe_file.exists():
                atomic_write(self.recipe_file, recipe.to_yaml())
            yield
        finally:
            lock.release()

    def write_metadata(self, recipe: TrainingRecipe | ProbeRecipe, data: list[dict], **start: object) -> None:
        """Write recipe.yaml and environment.json. A resumed run appends to the list of starts.

        Args:
            data: Description of the shard sets.
            start: step, world_size, device, deepspeed (its configuration), and before: step and time of the last
                logged line, which may be after `step`.
        """
        atomic_write(self.recipe_file, recipe.to_yaml())
        try:
            starts = json.loads(self.environment.read_text())["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            starts = []
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **start,
            "command": sys.argv,
            "zero_stage": recipe.engine.zero_stage,
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": package_versions(),
            "commit": _commit(),
        }
        write_json(self.environment, {**start, "data": data, "starts": [*starts, start]})

    def _acquire(self, lock: FileLock, timeout_s: float) -> None:
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info(f"{self}: in use by {self._holder()}; waiting up to {timeout_s:.0f} s")
                lock.acquire(timeout=timeout_s, poll_interval=0.5)
            self.lock_file.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout as error:
            raise UserError(
                f"--run {self}: in use by another job ({self._holder()}); wait for it or stop it"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning(
                f"{self}: file locking is not supported here ({error.strerror}); make sure only one job uses this "
                "directory"
            )

    def _holder(self) -> str:
        return self.lock_file.read_text(errors="replace").strip() or "an unknown process"


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that may affect results."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _commit() -> str | None:
    """Return the commit of the source tree, None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
