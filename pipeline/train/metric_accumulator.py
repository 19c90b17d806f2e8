"""Metrics between two logged lines."""

import torch

from pipeline.distributed.collectives import all_reduce_mean


class MetricAccumulator:
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
            for row in all_reduce_mean(torch.stack(rows)).tolist():
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
