"""Weights & Biases logging (train.wandb), if the package is installed.

Invariant: a run directory is one W&B run, named by RUN/wandb/id, however often it is resumed. No failure of W&B stops
training. Nothing is sent unless the recipe asks for it; WANDB_MODE=offline keeps everything in RUN/wandb.

W&B keeps lines that a resumed run removed from metrics.jsonl; new lines of the same step replace them in plots.
"""

import importlib.util
import logging
import os
import secrets
from contextlib import suppress

from pipeline.errors import UserError
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def check_installed(recipe: TrainingRecipe | ProbeRecipe) -> None:
    """Raise UserError if the recipe asks for wandb and the package is missing."""
    if recipe.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb: the package wandb is not installed; pip install wandb, or set the key to null")


class WandbLogger:
    """Starts or resumes the W&B run of a run directory.

    Raises:
        UserError: If nobody is logged in.
    """

    def __init__(self, run: RunDirectory, recipe: TrainingRecipe | ProbeRecipe):
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        run.wandb.mkdir(exist_ok=True)
        id_file = run.wandb / "id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        offline = os.environ.get("WANDB_MODE") == "offline"
        self._run: wandb.Run | None = None
        try:
            self._run = wandb.init(
                project=recipe.train.wandb,
                id=id_file.read_text().strip(),
                name=run.path.resolve().name,
                config=recipe.model_dump(mode="json"),
                dir=str(run),
                resume=None if offline else "allow",
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
            self._run.define_metric("*", step_metric="step")
            logger.info(f"W&B run {self._run.id}: {'offline' if self._run.offline else self._run.url}")
        except (UsageError, AuthenticationError) as error:
            raise UserError(f"train.wandb: {error}") from error
        except Exception as error:
            self._disable(error)

    def log(self, line: dict) -> None:
        """Log the numbers of one line of metrics.jsonl."""
        if self._run is not None:
            try:
                self._run.log(line)
            except Exception as error:  # of its service process, which a signal to the job may end
                self._disable(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._disable(error)

    def _disable(self, error: Exception) -> None:
        """Continue without W&B until the next start."""
        import wandb

        logger.warning(f"W&B failed ({error}); metrics are in metrics.jsonl only until the run is resumed")
        self._run = None
        with suppress(Exception):
            wandb.teardown()  # otherwise the process would wait for the service at its end
