"""Targets and losses: pure functions that compute in float32, whatever precision comes in (float64 stays).

Invariant: a loss is the mean over images of a per-image loss, so it does not depend on how a batch is cut
into ranks and micro batches.
"""

from itertools import combinations

import torch
from torch.nn import functional as F


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """images (B, 3, H, W) -> patches (B, L, P*P*3): patches row by row, pixels in row, column, channel order
    (MAE's).

    H or W not a multiple of the patch size: ValueError.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"a {height} x {width} image cannot be cut into patches of {patch_size} pixels")
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def normalize_targets(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Each patch (last dimension) less its mean, over its standard deviation; unbiased variance (MAE's
    norm_pix_loss)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def denormalize(prediction: torch.Tensor, patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Undo `normalize_targets`: a prediction on the normalised scale, with the mean and variance of the true
    patches."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return prediction * (variance + eps).sqrt() + mean


def patch_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """MAE's error of a patch: the mean over its pixels of the squared difference. (..., M, D) -> float32
    (..., M)."""
    return (_wide(prediction) - _wide(target)).square().mean(dim=-1)


def difficulty_flatten_loss(
    error: torch.Tensor, distance: torch.Tensor, gamma: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Efficient MAE's Difficulty-Flatten Loss, Eq. 2, with the weights d^-gamma of each image adding up to
    one.

    error (B, M), distance (B, M) > 0, keep bool (B, M) or None for all -> scalar, the mean over images.
    Patches that are not kept, or infinitely far, have no weight; an image that keeps none counts as 0.
    """
    counted = distance.isfinite() if keep is None else keep & distance.isfinite()
    # Filled in before the power: 0 and infinity would make its gradient NaN even where they do not count.
    weight = _wide(distance).masked_fill(~counted, 1.0).pow(-gamma).masked_fill(~counted, 0.0)
    return weighted_mean(error, weight)


def weighted_mean(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Per image (first dimension) the mean of its errors with these weights, then the mean over images.

    A patch without weight may have any error, NaN included; an image without weights counts as 0.
    """
    error, weight = _wide(error).flatten(1), weight.flatten(1)
    total = (weight * torch.where(weight > 0, error, 0.0)).sum(dim=1)
    everything = weight.sum(dim=1)
    return (total / torch.where(everything > 0, everything, 1.0)).mean()


def self_consistency_loss(prediction: torch.Tensor, masked: torch.Tensor, kind: str = "l1") -> torch.Tensor:
    """EMAE's self-consistency: how much the K predictions of one patch disagree.

    prediction (B, K, L, D), masked bool (B, K, L) -> scalar. For each pair of parts i < j the mean difference
    of their predictions over the positions masked in both, averaged over an image's pairs that have such a
    position, then over images; 0 where no pair has one (K < 3 with EMAE's own parts). `kind` as in
    `disagreement`.
    """
    prediction = _wide(prediction)
    total = prediction.new_zeros(len(prediction))
    pairs = torch.zeros_like(total)
    for i, j in combinations(range(prediction.shape[1]), 2):
        both = masked[:, i] & masked[:, j]
        shared = both.sum(dim=1)
        difference = disagreement(prediction[:, i], prediction[:, j], kind).mean(dim=-1)  # (B, L)
        # where, not a product: a prediction at a position that does not count may be anything, NaN included
        total = total + torch.where(both, difference, 0.0).sum(dim=1) / shared.clamp(min=1)
        pairs = pairs + (shared > 0)
    return (total / pairs.clamp(min=1)).mean()


def disagreement(first: torch.Tensor, second: torch.Tensor, kind: str) -> torch.Tensor:
    """Elementwise difference of two predictions: l1, l2 (squared) or smooth_l1 (Huber with threshold
    1)."""
    first, second = _wide(first), _wide(second)
    if kind == "l1":
        return (first - second).abs()
    if kind == "l2":
        return (first - second).square()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(first, second, reduction="none")
    raise ValueError(f"consistency of kind {kind!r}: expected l1, l2 or smooth_l1")


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
