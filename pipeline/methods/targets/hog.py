"""Histograms of oriented gradients (HOG) of image patches, as targets of MaskFeat.

"Masked Feature Prediction for Self-Supervised Visual Pre-Training", Wei et al., CVPR 2022, Section 3.2 and its code:
9 unsigned orientations, cells of 8 x 8 pixels, each color channel and cell normalized to unit length, gradients by
Sobel filters, weighted by a Gaussian window of 16 x 16 pixels. (No maintained library computes HOG on tensors.)
"""

import math

import torch
from torch.nn import functional as F

NUM_BINS = 9
CELL = 8
"""Side of a cell, in pixels."""
WINDOW = 16
"""Side of the tiles of the Gaussian window, in pixels; its standard deviation is half of it."""


def hog_features(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Compute the HOG of each patch.

    Args:
        images: (B, C, H, W), H and W multiples of `patch_size`. An offset or a positive scale of a channel does not
            matter.
        patch_size: P in pixels, a multiple of CELL.

    Returns:
        float32 (or float64) (B, L, C * NUM_BINS * (P / CELL)^2), patches in raster order.

    Raises:
        ValueError: If P is not a multiple of CELL.
    """
    if patch_size % CELL:
        raise ValueError(f"patch_size: {patch_size} px is not a multiple of {CELL}, the side of HOG's cells")
    images = images if images.dtype == torch.float64 else images.float()
    channels = images.shape[1]
    # Sobel's filter [[1, 0, -1], [2, 0, -2], [1, 0, -1]], made on the device: a copy from the host would wait for it.
    steps = torch.arange(-1, 2, dtype=images.dtype, device=images.device)
    sobel = (steps.abs() - 2)[:, None] * steps
    filters = torch.stack([sobel, sobel.T])[:, None].repeat(channels, 1, 1, 1)
    gradient = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), filters, groups=channels)
    along_x, along_y = gradient.unflatten(1, (channels, 2)).unbind(2)
    magnitude = torch.stack([along_x, along_y]).norm(dim=0) * _gaussian_window(images)
    # The orientation modulo pi, in bins.
    orientation = (torch.atan2(along_x, along_y) / math.pi * NUM_BINS).floor().long() % NUM_BINS
    histogram = magnitude.unsqueeze(2) * (
        orientation.unsqueeze(2) == torch.arange(NUM_BINS, device=images.device)[:, None, None]
    )
    cells = F.avg_pool2d(histogram.flatten(1, 2), CELL, divisor_override=1).unflatten(1, (channels, NUM_BINS))
    cells = F.normalize(cells, dim=2)  # (B, C, bins, H / CELL, W / CELL)
    per_patch = patch_size // CELL
    cells = cells.unflatten(4, (-1, per_patch)).unflatten(3, (-1, per_patch))
    # (B, C, bins, rows, cells, columns, cells) -> (B, rows * columns, C * bins * cells * cells)
    return cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def _gaussian_window(images: torch.Tensor) -> torch.Tensor:
    """Return the weights (H, W) of the pixels of images (..., H, W): a repeated Gaussian, the sum of a tile being 1."""
    height, width = images.shape[-2:]
    offset = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - (WINDOW - 1) / 2
    gaussian = (-0.5 * (offset / (WINDOW / 2)) ** 2).exp()
    tile = gaussian[:, None] * gaussian
    tile = tile / tile.sum()
    return tile.repeat(-(-height // WINDOW), -(-width // WINDOW))[:height, :width].to(images)


def draw_hog(features: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Draw histograms (..., 3 * NUM_BINS * (P / CELL)^2) as patches (..., P*P*3) with values from -2 to 2.

    In each cell, every bin is a line through the center along the edges whose gradients it counts.
    """
    side = patch_size // CELL
    cells = features.float().unflatten(-1, (3, NUM_BINS, side, side)).clamp(0, 1)
    offset = torch.arange(CELL, device=features.device) - (CELL - 1) / 2
    angle = (torch.arange(NUM_BINS, device=features.device) + 0.5) / NUM_BINS * math.pi
    # A gradient (dx, dy) is counted at atan2(dx, dy), so an edge, perpendicular to it, points along this direction.
    away = angle.sin()[:, None, None] * offset - angle.cos()[:, None, None] * -offset[:, None]
    lines = (1 - away.abs()).clamp(0)  # (bins, CELL, CELL)
    drawn = torch.einsum("...cbij,byx->...iyjxc", cells, lines).flatten(-3, -2).flatten(-4, -3).flatten(-2)
    drawn = drawn.flatten(-2)
    return drawn.clamp(0, 1) * 4 - 2
