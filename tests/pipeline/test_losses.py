"""Targets and losses against plain loops in float64."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.losses import (
    denormalize,
    disagreement,
    normalize_targets,
    patch_error,
    patchify,
    self_consistency_loss,
)

seeds = st.integers(0, 10**6)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds)
def test_patches_are_cut_row_by_row_with_channels_innermost(batch, patch, rows, columns, seed):
    images = numbers(seed, batch, 3, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * 3)
    for b in range(batch):
        for position in range(rows * columns):
            top, left = position // columns * patch, position % columns * patch
            expected = [
                images[b, c, top + y, left + x] for y in range(patch) for x in range(patch) for c in range(3)
            ]
            assert patches[b, position].tolist() == [value.item() for value in expected]


def test_an_image_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="30 x 32 image cannot be cut into patches of 8"):
        patchify(torch.rand(1, 3, 30, 32), 8)


@given(st.integers(1, 5), st.integers(2, 20), seeds)
def test_normalised_targets_have_unit_unbiased_variance_per_patch(count, pixels, seed):
    patches = numbers(seed, count, pixels) * 3 + 1
    exact = patches.double().numpy()
    expected = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(normalize_targets(patches).numpy(), expected, atol=2e-4)


def test_denormalising_the_normalised_patches_gives_them_back():
    patches = numbers(0, 2, 6, 48)
    assert torch.allclose(denormalize(normalize_targets(patches), patches), patches, atol=1e-5)


def test_error_of_a_patch_is_the_mean_squared_difference_in_float32_whatever_comes_in():
    prediction, target = numbers(1, 2, 3, 12).bfloat16(), numbers(2, 2, 3, 12)
    error = patch_error(prediction, target)
    expected = (prediction.double() - target.double()).pow(2).sum(-1) / 12
    assert error.dtype == torch.float32 and torch.allclose(error.double(), expected, atol=1e-6)


def slow_consistency(prediction: np.ndarray, masked: np.ndarray, difference) -> float:
    """The definition of DESIGN.md in plain loops."""
    per_image = []
    for p, m in zip(prediction, masked, strict=True):
        pairs = []
        for i, j in combinations(range(len(p)), 2):
            both = [position for position in range(p.shape[1]) if m[i, position] and m[j, position]]
            if both:
                values = [difference(a, b) for at in both for a, b in zip(p[i, at], p[j, at], strict=True)]
                pairs.append(sum(values) / len(values))
        per_image.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return sum(per_image) / len(per_image)


DIFFERENCES = {
    "l1": lambda a, b: abs(a - b),
    "l2": lambda a, b: (a - b) ** 2,
    "smooth_l1": lambda a, b: 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5,
}


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from(list(DIFFERENCES)), seeds)
def test_self_consistency_is_the_mean_over_pairs_of_the_disagreement_where_both_are_masked(
    batch, parts, length, kind, seed
):
    prediction = numbers(seed, batch, parts, length, 2)
    masked = numbers(seed + 1, batch, parts, length) > -0.5
    expected = slow_consistency(prediction.double().numpy(), masked.numpy(), DIFFERENCES[kind])
    assert math.isclose(
        self_consistency_loss(prediction, masked, kind).item(), expected, rel_tol=1e-4, abs_tol=1e-6
    )


def test_predictions_at_visible_positions_do_not_reach_the_consistency_or_its_gradient():
    prediction = numbers(3, 1, 3, 4, 2)
    masked = torch.tensor([[[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]]], dtype=torch.bool)
    garbage = prediction.clone()
    garbage[~masked] = 1e6
    garbage.requires_grad_()
    loss = self_consistency_loss(garbage, masked)
    assert torch.equal(loss, self_consistency_loss(prediction, masked))
    loss.backward()
    assert not garbage.grad[~masked].any()


@pytest.mark.parametrize("kind", list(DIFFERENCES))
def test_gradients_of_the_losses_are_right(kind):
    prediction = numbers(4, 2, 3, 4, 2).double().requires_grad_()
    target = numbers(5, 2, 3, 4, 2).double()
    masked = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool).expand(2, 3, 4)
    assert torch.autograd.gradcheck(lambda p: self_consistency_loss(p, masked, kind), prediction)
    assert torch.autograd.gradcheck(lambda p: patch_error(p, target), prediction)


def test_an_unknown_kind_of_disagreement_is_refused():
    with pytest.raises(ValueError, match="expected l1, l2 or smooth_l1"):
        disagreement(torch.zeros(1), torch.zeros(1), "l3")
