"""Targets and losses as pure functions, computed in float32 (or float64 for float64 inputs).

Invariant: a loss is the mean over images of a per-image loss, so it does not depend on how a batch is split
over ranks and micro batches.
"""

from itertools import combinations

import torch
from torch.nn import functional as F


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, 3, H, W) into flattened patches, as the official MAE code does.

    Returns:
        (B, L, P*P*3): patches in raster order, pixels of a patch in the order row, column, channel.

    Raises:
        ValueError: If H or W is not a multiple of P.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images: {height} x {width} pixels are no multiple of patch_size, {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def normalize_targets(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalize each patch (last dimension) by its mean and unbiased variance (MAE's norm_pix_loss)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def denormalize(prediction: torch.Tensor, patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Invert `normalize_targets` on a prediction (..., D) with statistics of the true patches (..., D)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return prediction * (variance + eps).sqrt() + mean


def patch_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of each patch, MAE's loss: (..., M, D) -> float32 (..., M)."""
    return (_upcast(prediction) - _upcast(target)).square().mean(dim=-1)


def difficulty_flatten_loss(
    error: torch.Tensor, distance: torch.Tensor, gamma: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute Efficient MAE's Difficulty-Flatten Loss, Eq. 2.

    Errors are weighted by d^-gamma, normalized per image. Patches that are not kept or infinitely far have no
    weight; an image without any weight contributes 0.

    Args:
        error: (B, M), error of each patch.
        distance: (B, M), difficulty d > 0 of each patch.
        gamma: Exponent, at least 0.
        keep: bool (B, M), patches that count; default all.

    Returns:
        Scalar, the mean over images.
    """
    counted = distance.isfinite() if keep is None else keep & distance.isfinite()
    # Fill before taking the power: the gradient at 0 and infinity is NaN even if masked afterwards.
    weight = _upcast(distance).masked_fill(~counted, 1.0).pow(-gamma).masked_fill(~counted, 0.0)
    return weighted_mean(error, weight)


def weighted_mean(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Average errors (B, ...) with weights (B, ...) per image, then over images -> scalar.

    Errors without weight may be NaN; an image without any weight contributes 0.
    """
    error, weight = _upcast(error).flatten(1), weight.flatten(1)
    weighted_sum = (weight * torch.where(weight > 0, error, 0.0)).sum(dim=1)
    total_weight = weight.sum(dim=1)
    return (weighted_sum / torch.where(total_weight > 0, total_weight, 1.0)).mean()


def self_consistency_loss(
    prediction: torch.Tensor, masked: torch.Tensor, kind: str = "l1", mean: str = "overlap"
) -> torch.Tensor:
    """Compute EMAE's self-consistency loss between the K predictions of an image.

    For each pair of parts i < j, the mean difference of their predictions over the positions masked in both;
    averaged over an image's pairs that share such a position, then over images. 0 if no pair shares one.

    Args:
        prediction: (B, K, L, D).
        masked: bool (B, K, L). Predictions at other positions may have any value, including NaN.
        kind: Difference, as in `disagreement`.
        mean: "overlap" as above. "all": for each pair the sum over the positions masked in both, divided by L;
            averaged over all pairs.

    Returns:
        Scalar.
    """
    if mean not in ("overlap", "all"):
        raise ValueError(f"mean: {mean!r} is not one of overlap and all")
    prediction = _upcast(prediction)
    total = prediction.new_zeros(len(prediction))
    num_pairs = torch.zeros_like(total)
    for i, j in combinations(range(prediction.shape[1]), 2):
        both_masked = masked[:, i] & masked[:, j]
        num_shared = both_masked.sum(dim=1)
        difference = disagreement(prediction[:, i], prediction[:, j], kind).mean(dim=-1)  # (B, L)
        # torch.where instead of a product, because NaN times 0 is NaN.
        count = num_shared.clamp(min=1) if mean == "overlap" else masked.shape[2]
        total = total + torch.where(both_masked, difference, 0.0).sum(dim=1) / count
        num_pairs = num_pairs + (num_shared > 0 if mean == "overlap" else 1)
    return (total / num_pairs.clamp(min=1)).mean()


def disagreement(first: torch.Tensor, second: torch.Tensor, kind: str) -> torch.Tensor:
    """Compute the elementwise difference of two predictions of the same shape.

    `kind` is "l1", "l2" (squared) or "smooth_l1" (Huber with threshold 1), otherwise ValueError is raised.
    """
    first, second = _upcast(first), _upcast(second)
    if kind == "l1":
        return (first - second).abs()
    if kind == "l2":
        return (first - second).square()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(first, second, reduction="none")
    raise ValueError(f"kind: {kind!r} is not one of l1, l2 and smooth_l1")


def _upcast(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
