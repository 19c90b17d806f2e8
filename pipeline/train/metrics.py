"""Metrics logging to metrics.jsonl, TensorBoard, and optionally Weights & Biases.

Invariant: the losses in metrics.jsonl do not depend on interruptions. A resumed run removes the lines after its
checkpoint, and the metrics accumulated since the last line are part of the checkpoint.
"""

import errno
import json
import logging
import os
import threading
import time
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from pipeline.io.atomic import atomic_write
from pipeline.io.metrics_file import read_metrics
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.progress_bar import ProgressBar
from pipeline.train.run_directory import RunDirectory
from pipeline.train.wandb_logger import WandbLogger

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Writes the metrics of a run from the line after `step` on. Used by rank 0.

    Args:
        rollbacks: The guard's events, all of which the file must have, and no others.
    """

    def __init__(
        self,
        run: RunDirectory,
        recipe: TrainingRecipe | ProbeRecipe,
        step: int,
        total_steps: int,
        rollbacks: list[dict],
    ):
        self.last_line = _truncate_after(run.metrics, step, rollbacks)
        """{"step", "time"} of the last line before this start, which may be after `step`; None for a new run."""
        self._file = open(run.metrics, "a")  # noqa: SIM115 (closed in `close`)
        threading.excepthook = _ignore_full_disk
        self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        self._progress = ProgressBar(step, total_steps)
        self._wandb = WandbLogger(run, recipe) if recipe.train.wandb else None

    def write(self, line: dict) -> None:
        """Append one line. Its numbers also go to TensorBoard and W&B, the main ones to the progress bar."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if name not in ("step", "time"):
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.log(numbers)
        self._progress.show(line)

    def write_stop(self, step: int, reason: str) -> None:
        """Append the event that training cannot go on after `step`; a rollback removes it."""
        event = {"step": step, "event": "stop", "time": round(time.time(), 3), "reason": reason}
        self._file.write(json.dumps(event) + "\n")
        self.flush()

    def advance(self, step: int) -> None:
        """Advance the progress bar."""
        self._progress.advance(step)

    def flush(self) -> None:
        """Force everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        self._progress.close()
        self._file.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.close()


def _ignore_full_disk(arguments: threading.ExceptHookArgs) -> None:
    """Drop the traceback of TensorBoard's writer thread on a full disk; the main thread reports the same error."""
    if getattr(arguments.exc_value, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        threading.__excepthook__(arguments)


def _truncate_after(path: Path, step: int, rollbacks: list[dict]) -> dict | None:
    """Remove the lines after `step`, events other than `rollbacks`, and unreadable lines.

    Returns:
        Step and time of the last line before.
    """
    lines, num_damaged = read_metrics(path) if path.exists() else ([], 0)
    if num_damaged:
        logger.warning(f"{path}: removed {num_damaged} unreadable lines")
    kept, missing = [], list(rollbacks)
    for line in lines:
        if missing and line == missing[0]:
            kept.append(missing.pop(0))
        elif line["step"] <= step and "event" not in line:
            kept.append(line)
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept + missing))
    return {"step": lines[-1]["step"], "time": lines[-1].get("time")} if lines else None
