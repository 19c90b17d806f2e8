"""What a run says of itself, in numbers: metrics.jsonl and TensorBoard.

Invariant: the losses in metrics.jsonl do not depend on interruptions. Lines after the checkpoint that a run
continues from are taken back, and what was collected towards the next line is part of the checkpoint.
"""

import json
import os
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.train.distributed import all_ranks_mean
from pipeline.train.progress import Progress


class Window:
    """Per-step numbers since the last logged line, kept on the device until they are asked for."""

    def __init__(self, collected: dict[str, list[float]] | None = None):
        self.collected = {name: list(values) for name, values in (collected or {}).items()}
        self._pending: list[dict[str, torch.Tensor]] = []

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Take one step's 0-d tensors; the same names at every step."""
        self._pending.append(values)

    def collect(self) -> dict[str, list[float]]:
        """Each number's mean over the ranks, a value a step. Every rank must call it; it waits for the
        device.

        The ranks are averaged step by step, so how often this is called does not change a value.
        """
        if self._pending:
            names = list(self._pending[0])
            rows = [torch.stack([step[name].float() for name in names]) for step in self._pending]
            for name, column in zip(names, all_ranks_mean(torch.stack(rows)).T.tolist(), strict=True):
                self.collected.setdefault(name, []).extend(column)
            self._pending.clear()
        return self.collected

    def close(self) -> dict[str, float]:
        """The mean over the window's steps of each number; the window starts anew."""
        means = {name: sum(values) / len(values) for name, values in self.collect().items()}
        self.collected = {}
        return means


class Log:
    """Writes the metrics of a run, from the line after `step` on."""

    def __init__(self, run: Path, step: int, total_steps: int):
        self.path = run / "metrics.jsonl"
        _take_back(self.path, step)
        self.file = open(self.path, "a")  # noqa: SIM115 (closed in `close`)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = Progress(step, total_steps)

    def write(self, line: dict) -> None:
        """Append one line; numbers also go to TensorBoard under their names, the bar shows the main ones."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, line["step"])
        self.bar.show(line)

    def advance(self, step: int) -> None:
        self.bar.advance(step)

    def flush(self) -> None:
        """Force everything written so far to the disk."""
        os.fsync(self.file.fileno())
        self.board.flush()

    def note(self, text: str) -> None:
        """A sentence for whoever watches."""
        self.bar.note(text)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()


def _take_back(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    temporary = path.with_name(path.name + ".new")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
