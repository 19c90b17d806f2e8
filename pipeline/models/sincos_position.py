"""Fixed 2-D sine-cosine position embeddings, equal in value to those of the official MAE code."""

import torch


def sincos_2d(width: int, grid: int) -> torch.Tensor:
    """Compute the position embedding of a class token and `grid` x `grid` patches in raster order.

    The first half of the channels encodes the column, the second half the row, each as sines and cosines of
    geometrically spaced frequencies from 1 to 1/10000. The class token's embedding is zero.

    Returns:
        float32 (1, 1 + grid^2, width), computed in float64.

    Raises:
        ValueError: If `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width: {width} is not a multiple of 4, which 2-D sine-cosine positions need")
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(grid * grid, width)
    return torch.cat([torch.zeros_like(patches[:1]), patches])[None].float()
