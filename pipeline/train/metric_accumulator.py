"""Metrics of the steps between two logged lines."""

import torch

from pipeline.distributed.collectives import all_reduce_mean
from pipeline.io.metrics_file import RENAMED_COLUMNS


class MetricAccumulator:
    """Keeps per-step metrics on the device until they are needed.

    Args:
        collected: The state of a checkpoint, also of earlier versions: metric name to one value per step.
    """

    def __init__(self, collected: dict[str, list[float]] | None = None):
        self._collected = {RENAMED_COLUMNS.get(name, name): list(values) for name, values in (collected or {}).items()}
        self._pending: list[dict[str, torch.Tensor]] = []

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one step's 0-d tensors: the same names at every step, with "skipped" (1.0 or 0.0) among them."""
        self._pending.append(values)

    def reduce(self) -> None:
        """Reduce the values of the added steps to their means over all ranks (collective). Waits for the device.

        Ranks are averaged step by step, so the values do not depend on how often this is called.
        """
        if not self._pending:
            return
        names = list(self._pending[0])
        rows = [torch.stack([step[name].float() for name in names]) for step in self._pending]
        for row in all_reduce_mean(torch.stack(rows)).tolist():
            step = dict(zip(names, row, strict=True))
            for name, value in step.items():
                values = self._collected.setdefault(name, [])
                if name == "skipped" or not step["skipped"]:
                    values.append(value)
        self._pending.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """Return the mean over ranks of each metric, one value per step. Collective, because it calls `reduce`."""
        self.reduce()
        return self._collected

    def compute_and_reset(self) -> dict[str, float | int | None]:
        """Return each metric's mean over the steps that were not skipped (None without one), and clear.

        Collective, because it calls `reduce`. "skipped" is the number of skipped steps.
        """
        self.reduce()
        means: dict[str, float | int | None] = {
            name: sum(values) / len(values) if values else None for name, values in self._collected.items()
        }
        means["skipped"] = int(sum(self._collected["skipped"]))
        self._collected = {}
        return means
