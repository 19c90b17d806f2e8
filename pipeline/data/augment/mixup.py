"""Mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412) and CutMix (Yun et al., 2019,
https://arxiv.org/abs/1905.04899), timm's laws in its mode "pair", one of the two with equal chances.

Invariant: an image's partner is its neighbour in the stream: positions 2i and 2i + 1 are mixed with each
other, with the share that the noise of the first one gives. (With k crops of an image that follow each other,
crop j of an image and crop j of the next.) So who is mixed with whom, and how, depends neither on ranks nor
on micro batches, as long as these hold whole pairs.
"""

import torch

from pipeline.data.augment.random_erasing import inside

TRIES = 16
NOISE_DIM = 1 + 2 * TRIES + 2


def mixup_cutmix(
    images: torch.Tensor,
    targets: torch.Tensor,
    noise: torch.Tensor,
    mixup: float,
    cutmix: float,
    crops: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """images (B, 3, H, W), targets (B, C), noise (B, NUMBERS) -> images and targets, mixed alike.

    mixup, cutmix: each one's alpha, the share being drawn from Beta(alpha, alpha), 0 < alpha <= 1; 0 leaves
    it out. B is a multiple of 2 crops.
    """
    height, width = images.shape[-2:]
    switch, tries, centre = _of_the_first(noise, crops).split([1, 2 * TRIES, 2], dim=1)
    cuts = (switch < 0.5) & (cutmix > 0) if mixup else torch.full_like(switch, True, dtype=torch.bool)
    alpha = torch.where(cuts, cutmix, mixup)
    share = beta(tries, alpha)
    side = (1 - share).sqrt()
    y, x = ((centre * centre.new_tensor([height, width])).floor()).split(1, dim=1)
    box = _around(y, side, height)[:, :, None] & _around(x, side, width)[:, None, :]
    kept = 1 - box.float().mean((1, 2))[:, None]
    share = torch.where(cuts, kept, share)
    weight = torch.where(cuts[:, :, None], (~box).float(), share[:, :, None])[:, None]
    mixed = weight * images + (1 - weight) * partner(images, crops)
    return mixed, share * targets + (1 - share) * partner(targets, crops)


def partner(rows: torch.Tensor, crops: int = 1) -> torch.Tensor:
    """(B, ...): of each row the one that it is mixed with."""
    return rows.unflatten(0, (-1, 2, crops)).flip(1).flatten(0, 2)


def beta(tries: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Numbers (B, 1) of Beta(alpha, alpha) from tries (B, 2 TRIES), uniform, and alpha (B, 1) in (0, 1].

    Jöhnk's method (1964). One in 65,000 images has no accepted try at alpha = 1, and takes a half.
    """
    first, second = ((1 - tries).log() / alpha).chunk(2, dim=1)
    accepted = first.exp() + second.exp() <= 1
    row = accepted.byte().argmax(dim=1, keepdim=True)
    share = (first.gather(1, row) - second.gather(1, row)).sigmoid()
    return torch.where(accepted.any(dim=1, keepdim=True), share, 0.5)


def _of_the_first(noise: torch.Tensor, crops: int) -> torch.Tensor:
    """(B, n): every row has the numbers of its pair's first."""
    pairs = noise.unflatten(0, (-1, 2, crops))
    return pairs[:, :1].expand_as(pairs).flatten(0, 2)


def _around(centre: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """bool (B, length): which places the box covers along an axis; side (B, 1): as a share of it."""
    cut = (length * side).floor()
    return inside(centre - (cut / 2).floor(), centre + ((cut + 1) / 2).floor(), length)
