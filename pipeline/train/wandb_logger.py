"""Weights & Biases, where the recipe asks for it (train.wandb) and the package is installed.

Invariant: a run directory is one run there, whatever interrupts it: RUN/wandb/id names it. Nothing is sent
unless the recipe asks; WANDB_MODE=offline keeps everything in RUN/wandb, for `wandb sync`.

What happens there stops no training: the helper process that wandb starts may be gone at any moment.

Lines that a continued run takes back from metrics.jsonl stay there and are drawn over; step is the axis.
"""

import importlib.util
import os
import secrets
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe.base import TrainingRecipe


def check_installed(recipe: TrainingRecipe) -> None:
    """UserError where the recipe asks for a package that is not installed."""
    if recipe.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.wandb: the package wandb is not installed; pip install wandb, or set the key to null"
        )


class WandbError(Exception):
    """wandb could not begin, by whatever it met: the run goes on without it."""


class WandbLogger:
    """The run there, begun or continued; `said` is a sentence about it.

    Where the server is out of reach, this start is recorded in RUN/wandb alone. UserError where nobody is
    logged in; Failed for all else that wandb raises.
    """

    def __init__(self, run: Path, recipe: TrainingRecipe):
        import wandb

        folder = run / "wandb"
        folder.mkdir(exist_ok=True)
        path = folder / "id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        options = {
            "project": recipe.train.wandb,
            "id": path.read_text().strip(),
            "name": run.resolve().name,
            "config": recipe.model_dump(mode="json"),
            "dir": str(run),
            "settings": wandb.Settings(console="off", silent=True, disable_git=True),
        }
        try:
            self._begin(options)
        except UserError:
            raise
        except Exception as error:
            self.abandon()
            raise WandbError(str(error)) from error

    def _begin(self, options: dict) -> None:
        import wandb

        offline = os.environ.get("WANDB_MODE") == "offline"
        try:
            self.run = wandb.init(**options, resume=None if offline else "allow")
            self.said = f"Weights & Biases: {self.run.id}, {'offline' if self.run.offline else self.run.url}"
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(f"train.wandb: {error}") from None
        except wandb.errors.CommError as error:
            wandb.teardown()  # its service holds on to the run
            self.run = wandb.init(**options, mode="offline")
            why = str(error).splitlines()[0]
            self.said = f"Weights & Biases cannot be reached ({why}): for `wandb sync`, in {self.run.dir}"
        self.run.define_metric("*", step_metric="step")

    def write(self, line: dict) -> None:
        self.run.log(line)

    def close(self) -> None:
        self.run.finish()

    def abandon(self) -> None:
        """Let go of its helper process, which answers no more, or it would be waited for at the end."""
        import wandb

        with suppress(Exception):
            wandb.teardown()
