"""Scores of semantic segmentation: mIoU, mAcc and aAcc, as mmsegmentation and ADE20K's evaluation define them.

Invariant: every score is a function of one confusion matrix of integers over all labeled pixels of a set, so it does
not depend on how the set is divided among batches and ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.data.label_maps import IGNORED


class SegmentationScores(NamedTuple):
    """Scores in [0, 1]."""

    miou: float
    """Mean over classes of intersection over union. Classes that occur neither in labels nor in predictions have no
    union and do not count."""
    macc: float
    """Mean over the classes that occur in the labels of the share of their pixels that are predicted correctly."""
    aacc: float
    """Share of the labeled pixels that are predicted correctly."""
    iou: dict[str, float]
    """Intersection over union by class name, of the classes that count."""


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count the labeled pixels by class and predicted class: int64 (C, C), classes in rows.

    Args:
        predicted: Classes, integers of any shape.
        labels: Classes, of the same shape; IGNORED where unlabeled.
    """
    labels, predicted = labels.flatten().long(), predicted.flatten().long()
    counted = labels != IGNORED
    pairs = num_classes * labels[counted] + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def compute_scores(matrix: torch.Tensor, names: Sequence[str]) -> SegmentationScores:
    """Return the scores of a confusion matrix (C, C) over the classes `names`; nan if no pixel is labeled."""
    matrix = matrix.cpu().double()
    correct, labeled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = labeled + predicted - correct
    iou = {name: value for name, value, size in zip(names, (correct / union).tolist(), union, strict=True) if size}
    accuracy = (correct / labeled)[labeled > 0]
    return SegmentationScores(
        sum(iou.values()) / len(iou) if iou else float("nan"),
        float(accuracy.mean()),
        float(correct.sum() / labeled.sum()),
        iou,
    )
