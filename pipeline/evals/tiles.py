"""A photograph as squares of the model's image size, and patches back to images."""

import math

import torch


def cut(images: torch.Tensor, per_side: int) -> torch.Tensor:
    """(B, C, N S, N S) to (B N N, C, S, S), row by row."""
    batch, channels, side, _ = images.shape
    size = side // per_side
    squares = images.reshape(batch, channels, per_side, size, per_side, size)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)


def join(squares: torch.Tensor, per_side: int) -> torch.Tensor:
    """The inverse of `cut`."""
    count, channels, size, _ = squares.shape
    images = squares.reshape(count // per_side**2, per_side, per_side, channels, size, size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, per_side * size, per_side * size)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, L, P*P*3) in patchify's order back to square images (B, 3, S, S)."""
    batch, length, _ = patches.shape
    grid = math.isqrt(length)
    tiles = patches.reshape(batch, grid, grid, patch_size, patch_size, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * patch_size, grid * patch_size)


def as_maps(values: torch.Tensor, per_side: int) -> torch.Tensor:
    """A number a patch, (B N N, L), to maps of whole photographs (B, N G, N G)."""
    grid = math.isqrt(values.shape[1])
    return join(values.reshape(-1, 1, grid, grid), per_side)[:, 0]
