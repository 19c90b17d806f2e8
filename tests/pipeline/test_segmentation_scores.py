"""mIoU, mAcc and aAcc from a confusion matrix, against ADE20K's definition in plain numpy."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.label_maps import IGNORED, decode_labels
from pipeline.evals.segmentation_scores import compute_scores, confusion_matrix

SAMPLE = os.environ.get("ADE_SAMPLE_DIR")


def score(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int):
    """Return the scores of (labels, predictions) pairs, both with classes from 0."""
    matrices = [
        confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(labels), num_classes)
        for labels, predicted in pairs
    ]
    return compute_scores(torch.stack(matrices).sum(0), [f"class {number}" for number in range(num_classes)])


def official(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> tuple[float, float, float, dict]:
    """ADE20K's evaluation: areas of intersection and union over all images; numbers from 1, label 0 is ignored."""
    intersection, in_labels, in_predictions = np.zeros((3, num_classes))
    right = total = 0
    for labels, predicted in pairs:
        predicted = predicted * (labels > 0)
        right += ((predicted == labels) & (labels > 0)).sum()
        total += (labels > 0).sum()
        for number in range(1, num_classes + 1):
            intersection[number - 1] += ((predicted == number) & (labels == number)).sum()
            in_labels[number - 1] += (labels == number).sum()
            in_predictions[number - 1] += (predicted == number).sum()
    union = in_labels + in_predictions - intersection
    iou = {f"class {i}": intersection[i] / union[i] for i in range(num_classes) if union[i]}
    accuracy = [intersection[i] / in_labels[i] for i in range(num_classes) if in_labels[i]]
    return float(np.mean(list(iou.values()))), float(np.mean(accuracy)), right / total, iou


@pytest.mark.skipif(SAMPLE is None, reason="ADE_SAMPLE_DIR is not set")
@pytest.mark.parametrize("shift", [0, 20])
def test_scores_on_ade20k_follow_the_official_definition(shift):
    """The sample's predictions are copies of its label maps, so they are also compared after a shift by 20 pixels."""
    folder = Path(str(SAMPLE))
    arrays, pairs = [], []
    for path in sorted((folder / "predictions").iterdir()):
        encoded = np.frombuffer((folder / "annotations/validation" / path.name).read_bytes(), np.uint8)
        predicted = np.roll(np.asarray(Image.open(path)), shift, axis=1).clip(min=1)
        arrays.append((np.asarray(Image.open(folder / "annotations/validation" / path.name)), predicted))
        pairs.append((decode_labels(encoded, predicted.shape[::-1]), predicted - np.uint8(1)))
    miou, macc, aacc, iou = official(arrays, 150)
    scores = score(pairs, 150)
    assert scores[:3] == pytest.approx((miou, macc, aacc), abs=1e-9)
    assert scores.iou == pytest.approx(iou, abs=1e-9) and len(arrays) == 3 and len(iou) == 15
    assert (aacc == 1) if shift == 0 else (0.5 < aacc < 0.95 and 0.2 < miou < 0.9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5))
def test_scores_equal_the_definition_on_random_maps(seed, num_classes, images):
    rng = np.random.default_rng(seed)
    arrays = [
        (rng.integers(0, num_classes + 1, (6, 7)), rng.integers(1, num_classes + 1, (6, 7))) for _ in range(images)
    ]
    if not any((labels > 0).any() for labels, _ in arrays):
        return
    pairs = [(np.where(labels == 0, IGNORED, labels - 1), predicted - 1) for labels, predicted in arrays]
    miou, macc, aacc, iou = official(arrays, num_classes)
    scores = score(pairs, num_classes)
    assert scores[:3] == pytest.approx((miou, macc, aacc), abs=1e-9) and scores.iou == pytest.approx(iou, abs=1e-9)


def test_classes_without_a_union_do_not_count():
    labels, predicted = np.array([0, 0, 1, IGNORED]), np.array([0, 1, 1, 3])
    scores = score([(labels, predicted)], 5)
    assert set(scores.iou) == {"class 0", "class 1"}
    assert scores.miou == pytest.approx((1 / 2 + 1 / 2) / 2) and scores.macc == pytest.approx((1 / 2 + 1) / 2)
    assert scores.aacc == pytest.approx(2 / 3)
