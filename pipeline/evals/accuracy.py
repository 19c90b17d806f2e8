"""Top-1 and top-5 accuracy with confidence intervals.

Invariant: counts are integers over samples, so they add up over ranks and batches without rounding.
"""

from typing import NamedTuple

import torch

TOP_K = 5


class Accuracy(NamedTuple):
    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval. It covers the draw of the test images, not the variance of training."""
        from scipy.stats import binomtest  # takes a second to import

        low, high = binomtest(self.correct, self.total).proportion_ci(method="wilson")
        return float(low), float(high)

    def as_json(self) -> dict:
        low, high = self.interval
        return {**self._asdict(), "accuracy": self.share, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:7.2%} [{low:.2%}, {high:.2%}]"


def rank_of_label(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the classes ranked before the true one, (B,), for scores (B, C) and labels (B,).

    Of equal scores the lower class ranks first, as in `argmax`. C if the true class's score is not finite.
    """
    true_scores = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > true_scores) | ((scores == true_scores) & (classes < labels[:, None]))
    return before.sum(1).masked_fill(~true_scores[:, 0].isfinite(), scores.shape[1])


def count_topk_correct(scores: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Count the samples whose true class has the highest score, and one of the five highest."""
    ranks = rank_of_label(scores, labels)
    return int((ranks < 1).sum()), int((ranks < TOP_K).sum())


def topk_accuracies(top1: int, top5: int, total: int, num_classes: int) -> dict[str, Accuracy]:
    """Return the accuracies by name; top-5 only if there are more than five classes."""
    accuracies = {"top1": Accuracy(top1, total)}
    return accuracies if num_classes <= TOP_K else {**accuracies, "top5": Accuracy(top5, total)}
