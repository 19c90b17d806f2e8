"""Targets and losses against plain loops in float64."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.losses import denormalize, disagreement, normalize_targets, patch_error, patchify, self_consistency_loss

seeds = st.integers(0, 10**6)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds)
def test_patchify_is_in_raster_order_with_channels_innermost(batch, patch, rows, columns, seed):
    images = randn(seed, batch, 3, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * 3)
    for b in range(batch):
        for position in range(rows * columns):
            top, left = position // columns * patch, position % columns * patch
            pixels = images[b, :, top : top + patch, left : left + patch]
            assert patches[b, position].tolist() == [
                pixels[c, y, x].item() for y in range(patch) for x in range(patch) for c in range(3)
            ]


def test_image_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(ValueError, match=r"images: 30 x 32 .* 8"):
        patchify(torch.rand(1, 3, 30, 32), 8)


@given(st.integers(1, 5), st.integers(2, 20), seeds)
def test_normalized_targets_have_unit_unbiased_variance(count, pixels, seed):
    patches = randn(seed, count, pixels).double() * 3 + 1  # pixels may be nearly equal, which amplifies rounding
    exact = patches.numpy()
    expected = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(normalize_targets(patches).numpy(), expected, atol=1e-9)


def test_denormalize_inverts_normalize_targets():
    patches = randn(0, 2, 6, 48)
    assert torch.allclose(denormalize(normalize_targets(patches), patches), patches, atol=1e-5)


def test_patch_error_is_the_float32_mean_squared_error():
    prediction, target = randn(1, 2, 3, 12).bfloat16(), randn(2, 2, 3, 12)
    error = patch_error(prediction, target)
    expected = (prediction.double() - target.double()).pow(2).sum(-1) / 12
    assert error.dtype == torch.float32 and torch.allclose(error.double(), expected, atol=1e-6)


def slow_consistency(prediction: np.ndarray, masked: np.ndarray, difference) -> float:
    """The definition in plain loops."""
    per_image = []
    for p, m in zip(prediction, masked, strict=True):
        pairs = []
        for i, j in combinations(range(len(p)), 2):
            both = [position for position in range(p.shape[1]) if m[i, position] and m[j, position]]
            if both:
                values = [difference(a, b) for n in both for a, b in zip(p[i, n], p[j, n], strict=True)]
                pairs.append(sum(values) / len(values))
        per_image.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return sum(per_image) / len(per_image)


DIFFERENCES = {
    "l1": lambda a, b: abs(a - b),
    "l2": lambda a, b: (a - b) ** 2,
    "smooth_l1": lambda a, b: 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5,
}


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from(list(DIFFERENCES)), seeds)
def test_self_consistency_is_the_mean_over_pairs_masked_in_both(batch, parts, length, kind, seed):
    prediction = randn(seed, batch, parts, length, 2)
    masked = randn(seed + 1, batch, parts, length) > -0.5
    expected = slow_consistency(prediction.double().numpy(), masked.numpy(), DIFFERENCES[kind])
    assert math.isclose(self_consistency_loss(prediction, masked, kind).item(), expected, rel_tol=1e-4, abs_tol=1e-6)


def test_consistency_ignores_predictions_at_visible_positions():
    prediction = randn(3, 1, 3, 4, 2)
    masked = torch.tensor([[[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]]], dtype=torch.bool)
    garbage = prediction.clone()
    garbage[~masked] = 1e6
    garbage.requires_grad_()
    loss = self_consistency_loss(garbage, masked)
    assert torch.equal(loss, self_consistency_loss(prediction, masked))
    loss.backward()
    assert not garbage.grad[~masked].any()


@pytest.mark.parametrize("kind", list(DIFFERENCES))
def test_gradients_equal_finite_differences(kind):
    prediction = randn(4, 2, 3, 4, 2).double().requires_grad_()
    target = randn(5, 2, 3, 4, 2).double()
    masked = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool).expand(2, 3, 4)
    assert torch.autograd.gradcheck(lambda p: self_consistency_loss(p, masked, kind), prediction)
    assert torch.autograd.gradcheck(lambda p: patch_error(p, target), prediction)


def test_an_unknown_kind_of_disagreement_raises():
    with pytest.raises(ValueError, match="kind: 'l3'"):
        disagreement(torch.zeros(1), torch.zeros(1), "l3")
