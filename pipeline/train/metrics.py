"""What a run says of itself, in numbers: metrics.jsonl and TensorBoard, and Weights & Biases where asked for.

Invariant: the losses in metrics.jsonl do not depend on interruptions. Lines after the checkpoint that a run
continues from are taken back, and what was collected towards the next line is part of the checkpoint.
"""

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipeline.io.atomic import atomic_write
from pipeline.io.metrics_file import read_lines
from pipeline.recipe.base import TrainingRecipe
from pipeline.train.progress_bar import ProgressBar
from pipeline.train.wandb_logger import WandbError, WandbLogger


class MetricsLogger:
    """Writes the metrics of a run, from the line after `step` on.

    returns: the guard's, which the file must hold, each once, and no others.
    """

    def __init__(self, run: Path, recipe: TrainingRecipe, step: int, total_steps: int, rollbacks: list[dict]):
        self.path = run / "metrics.jsonl"
        self.found = _truncate_after(self.path, step, rollbacks)
        """The last line of the run that this one continues: {"step", "time"}; None at the beginning."""
        self.file = open(self.path, "a")  # noqa: SIM115 (closed in `close`)
        threading.excepthook = _ignore_full_disk
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = ProgressBar(step, total_steps)
        self.wandb = self._init_wandb(run, recipe) if recipe.train.wandb else None

    def write(self, line: dict) -> None:
        """Append one line; numbers also go to TensorBoard and Weights & Biases, the main ones to the bar."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if name not in ("step", "time"):
                self.board.add_scalar(name, value, line["step"])
        if self.wandb:
            self._log_wandb(lambda there: there.write(numbers))
        self.bar.show(line)

    def stop(self, step: int, reason: str) -> None:
        """Append the event that no step after `step` can be trained; a return takes it back."""
        event = {"step": step, "event": "stop", "time": round(time.time(), 3), "reason": reason}
        self.file.write(json.dumps(event) + "\n")
        self.flush()

    def advance(self, step: int) -> None:
        self.bar.advance(step)

    def flush(self) -> None:
        """Force everything written so far to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()

    def note(self, text: str) -> None:
        """A sentence for whoever watches."""
        self.bar.note(text)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()
        if self.wandb:
            self._log_wandb(WandbLogger.close)

    def _init_wandb(self, run: Path, recipe: TrainingRecipe) -> WandbLogger | None:
        try:
            there = WandbLogger(run, recipe)
        except WandbError as error:
            self._note_without(error)
            return None
        self.note(there.said)
        return there

    def _log_wandb(self, what: Callable[[WandbLogger], None]) -> None:
        try:
            what(self.wandb)
        except Exception as error:  # of its helper process, which a signal to the run may end as well
            self.wandb.abandon()
            self.wandb = None
            self._note_without(error)

    def _note_without(self, error: Exception) -> None:
        self.note(
            f"Weights & Biases: {error}; nothing more goes there until the run continues, all is in "
            f"{self.path}"
        )


def _ignore_full_disk(what: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread of its own; what it meets, the main thread meets too, and says."""
    if getattr(what.exc_value, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        threading.__excepthook__(what)


def _truncate_after(path: Path, step: int, rollbacks: list[dict]) -> dict | None:
    """Remove the lines after `step`, events other than `returns`, and what is no line of a run's.

    Returns the step and time of the last line that was there."""
    lines, damaged = read_lines(path) if path.exists() else ([], 0)
    if damaged:
        print(f"warning: {path}: {damaged} lines cannot be read and are left out", file=sys.stderr)
    kept, missing = [], list(rollbacks)
    for line in lines:
        if missing and line == missing[0]:
            kept.append(missing.pop(0))
        elif line["step"] <= step and "event" not in line:
            kept.append(line)
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept + missing))
    return {"step": lines[-1]["step"], "time": lines[-1].get("time")} if lines else None
