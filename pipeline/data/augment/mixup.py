"""Mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412) and CutMix (Yun et al., 2019,
https://arxiv.org/abs/1905.04899), with the distributions of timm's mode "pair" and equal chances for the two.

Invariant: stream positions 2i and 2i + 1 are mixed with each other, as given by the noise of the first. (With
k crops for each image: crop j of an image and crop j of the next.) So mixing does not depend on ranks or micro
batches, as long as these contain whole pairs.
"""

import torch

from pipeline.data.augment.random_erasing import interval_mask

TRIES = 16
NOISE_DIM = 1 + 2 * TRIES + 2


def mixup_cutmix(
    images: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor, mixup: float, cutmix: float, crops: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images (B, 3, H, W) and targets (B, C) pairwise, given noise (B, NOISE_DIM).

    Args:
        mixup, cutmix: alpha in (0, 1] of each; the share is drawn from Beta(alpha, alpha); 0 disables it.
        crops: crops of each image; B must be a multiple of 2 crops.
    """
    height, width = images.shape[-2:]
    switch, tries, center = _noise_of_first(noise, crops).split([1, 2 * TRIES, 2], dim=1)
    use_cutmix = (switch < 0.5) & (cutmix > 0) if mixup else torch.full_like(switch, True, dtype=torch.bool)
    alpha = torch.where(use_cutmix, cutmix, mixup)
    share = draw_beta(tries, alpha)
    side = (1 - share).sqrt()
    y, x = (center[:, :1] * height).floor(), (center[:, 1:] * width).floor()
    box = _centered_mask(y, side, height)[:, :, None] & _centered_mask(x, side, width)[:, None, :]
    share_outside = 1 - box.float().mean((1, 2))[:, None]
    share = torch.where(use_cutmix, share_outside, share)
    weight = torch.where(use_cutmix[:, :, None], (~box).float(), share[:, :, None])[:, None]
    mixed = weight * images + (1 - weight) * swap_pairs(images, crops)
    return mixed, share * targets + (1 - share) * swap_pairs(targets, crops)


def swap_pairs(rows: torch.Tensor, crops: int = 1) -> torch.Tensor:
    """Return for each of the rows (B, ...) the one it is mixed with."""
    return rows.unflatten(0, (-1, 2, crops)).flip(1).flatten(0, 2)


def draw_beta(tries: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Draw (B, 1) from Beta(alpha, alpha), given tries (B, 2 TRIES), uniform, and alpha (B, 1) in (0, 1].

    Jöhnk's method (1964). At alpha = 1 one in 65,000 images has no accepted try and returns 1/2.
    """
    first, second = ((1 - tries).log() / alpha).chunk(2, dim=1)
    accepted = first.exp() + second.exp() <= 1
    row = accepted.byte().argmax(dim=1, keepdim=True)
    share = (first.gather(1, row) - second.gather(1, row)).sigmoid()
    return torch.where(accepted.any(dim=1, keepdim=True), share, 0.5)


def _noise_of_first(noise: torch.Tensor, crops: int) -> torch.Tensor:
    """Give both images of a pair the noise of the first: (B, n)."""
    pairs = noise.unflatten(0, (-1, 2, crops))
    return pairs[:, :1].expand_as(pairs).flatten(0, 2)


def _centered_mask(center: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """Mark the pixels of an axis, bool (B, length), inside the box; side (B, 1) is the box's share of the axis."""
    cut = (length * side).floor()
    return interval_mask(center - (cut / 2).floor(), center + ((cut + 1) / 2).floor(), length)
