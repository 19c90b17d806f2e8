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

import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.columns import read_lines
from pipeline.train.distributed import all_ranks_mean
from pipeline.train.progress import Progress
from pipeline.train.wandb_run import Failed, WandbRun
from pipeline.training_recipe import TrainingRecipe
from pipeline.whole_file import write_whole


class Window:
    """Per-step numbers since the last logged line, kept on the device until they are asked for."""

    def __init__(self, collected: dict[str, list[float]] | None = None):
        self.collected = {name: list(values) for name, values in (collected or {}).items()}
        self._pending: list[dict[str, torch.Tensor]] = []

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Take one step's 0-d tensors; the same names at every step, "skipped" (1.0 or 0.0) among them."""
        self._pending.append(values)

    def collect(self) -> dict[str, list[float]]:
        """Each number's mean over the ranks, a value a step. Every rank must call it; it waits for the
        device.

        The ranks are averaged step by step, so how often this is called does not change a value.
        """
        if self._pending:
            names = list(self._pending[0])
            rows = [torch.stack([step[name].float() for name in names]) for step in self._pending]
            for row in all_ranks_mean(torch.stack(rows)).tolist():
                step = dict(zip(names, row, strict=True))
                for name, value in step.items():
                    kept = self.collected.setdefault(name, [])
                    if name == "skipped" or not step["skipped"]:
                        kept.append(value)
            self._pending.clear()
        return self.collected

    def close(self) -> dict[str, float | int | None]:
        """The mean of each number over the window's steps but the skipped ones, None without one; and how
        many were skipped. The window starts anew."""
        means = {
            name: sum(values) / len(values) if values else None for name, values in self.collect().items()
        }
        means["skipped"] = int(sum(self.collected["skipped"]))
        self.collected = {}
        return means


class Log:
    """Writes the metrics of a run, from the line after `step` on.

    returns: the guard's, which the file must hold, each once, and no others.
    """

    def __init__(self, run: Path, recipe: TrainingRecipe, step: int, total_steps: int, returns: list[dict]):
        self.path = run / "metrics.jsonl"
        self.found = _take_back(self.path, step, returns)
        """The last line of the run that this one continues: {"step", "time"}; None at the beginning."""
        self.file = open(self.path, "a")  # noqa: SIM115 (closed in `close`)
        threading.excepthook = _quiet_where_the_disk_is_full
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = Progress(step, total_steps)
        self.wandb = self._begun_there(run, recipe) if recipe.train.wandb else None

    def write(self, line: dict) -> None:
        """Append one line; numbers also go to TensorBoard and Weights & Biases, the main ones to the bar."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if name not in ("step", "time"):
                self.board.add_scalar(name, value, line["step"])
        if self.wandb:
            self._tell(lambda there: there.write(numbers))
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
            self._tell(WandbRun.close)

    def _begun_there(self, run: Path, recipe: TrainingRecipe) -> WandbRun | None:
        try:
            there = WandbRun(run, recipe)
        except Failed as error:
            self._note_without(error)
            return None
        self.note(there.said)
        return there

    def _tell(self, what: Callable[[WandbRun], None]) -> None:
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


def _quiet_where_the_disk_is_full(what: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread of its own; what it meets, the main thread meets too, and says."""
    if getattr(what.exc_value, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        threading.__excepthook__(what)


def _take_back(path: Path, step: int, returns: list[dict]) -> dict | None:
    """Remove the lines after `step`, events other than `returns`, and what is no line of a run's.

    Returns the step and time of the last line that was there."""
    lines, damaged = read_lines(path) if path.exists() else ([], 0)
    if damaged:
        print(f"warning: {path}: {damaged} lines cannot be read and are left out", file=sys.stderr)
    kept, missing = [], list(returns)
    for line in lines:
        if missing and line == missing[0]:
            kept.append(missing.pop(0))
        elif line["step"] <= step and "event" not in line:
            kept.append(line)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept + missing))
    return {"step": lines[-1]["step"], "time": lines[-1].get("time")} if lines else None
