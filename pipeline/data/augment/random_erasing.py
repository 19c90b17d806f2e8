"""Random erasing (Zhong et al., "Random Erasing Data Augmentation", 2020, https://arxiv.org/abs/1708.04896),
with timm's distribution and one rectangle of per-pixel normal noise, as in MAE's fine-tuning."""

import math

import torch

AREA = (0.02, 1 / 3)
"""Range of the rectangle's share of the image."""
ASPECT = (0.3, 1 / 0.3)
TRIES = 10
NOISE_DIM = 1 + 2 * TRIES + 2 + 2
UINT32_MASK = 0xFFFFFFFF


def erase(images: torch.Tensor, noise: torch.Tensor, probability: float) -> torch.Tensor:
    """Erase a rectangle of each of the normalized images (B, 3, H, W), given noise (B, NOISE_DIM)."""
    height, width = images.shape[-2:]
    draw, area, aspect, corner, key = noise.split([1, TRIES, TRIES, 2, 2], dim=1)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * (height * width)
    low, high = map(math.log, ASPECT)
    aspect = (low + (high - low) * aspect).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.byte().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top = (corner[:, :1] * (height - h + 1)).floor()
    left = (corner[:, 1:] * (width - w + 1)).floor()
    erased = (draw < probability) & fits.any(dim=1, keepdim=True)
    box = interval_mask(top, top + h, height)[:, :, None] & interval_mask(left, left + w, width)[:, None, :]
    return torch.where((box & erased[:, :, None])[:, None], hash_normal(key, images.shape[1:]), images)


def interval_mask(start: torch.Tensor, end: torch.Tensor, length: int) -> torch.Tensor:
    """Mark the indexes, bool (B, length), in [start, end), for start and end (B, 1)."""
    index = torch.arange(length, device=start.device)
    return (index >= start) & (index < end)


def hash_normal(key: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return normal float32 (B, *shape), a hash of the position and each row's key (B, 2) in [0, 1)."""
    position = torch.arange(math.prod(shape), device=key.device)
    first, second = (key * 2**24).long()[:, :, None].unbind(1)
    bits = _mix_bits(_mix_bits(position + first * 0x9E3779B1) ^ second)
    radius = (-2 * ((bits + 1) * 2.0**-32).log()).sqrt()
    angle = 2 * math.pi * (_mix_bits(bits + 0x632BE5AB) * 2.0**-32)
    return (radius * angle.cos()).view(len(key), *shape)


def _mix_bits(bits: torch.Tensor) -> torch.Tensor:
    """Apply MurmurHash3's finalizer to 32-bit words, stored in int64."""
    bits = bits & UINT32_MASK
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & UINT32_MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & UINT32_MASK
    return bits ^ (bits >> 16)
