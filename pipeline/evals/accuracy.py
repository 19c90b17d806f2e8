"""How many were right, and how sure that is.

Invariant: counts are integers over samples, so they add up over ranks and batches without rounding. A score
that is not finite is never right.
"""

from typing import NamedTuple

import torch

Z = 1.959963984540054
"""95 % of a normal distribution lie within so many standard deviations."""
RESULT = "accuracy.json"
"""Of a run directory: what was measured."""
FIRST = 5
"""Classes among which top-5 looks for the true one."""


class Accuracy(NamedTuple):
    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927): of the samples drawn, not of the training."""
        n, p = self.total, self.share
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    def as_json(self) -> dict:
        low, high = self.interval
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.share,
            "low": low,
            "high": high,
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:7.2%} [{low:.2%}, {high:.2%}]"


def rank_of_label(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes stand before the true one, (B,), for scores (B, C) and labels (B,).

    Of equal scores the smaller class comes first, as in `argmax`. C where the true one's is not finite.
    """
    own = scores.gather(1, labels[:, None])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (numbers < labels[:, None]))
    return before.sum(1).masked_fill(~own[:, 0].isfinite(), scores.shape[1])


def count_topk_correct(scores: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """How many of B samples have their true class first, and among the first five."""
    ranks = rank_of_label(scores, labels)
    return int((ranks < 1).sum()), int((ranks < FIRST).sum())


def topk_accuracies(first: int, five: int, total: int, classes: int) -> dict[str, Accuracy]:
    """By name; without top5 where so few classes make it meaningless."""
    found = {"top1": Accuracy(first, total)}
    return found if classes <= FIRST else {**found, "top5": Accuracy(five, total)}
