"""Fixed 2-D sine-cosine positions, in value those of the official MAE code."""

import torch


def sincos_2d(width: int, grid: int) -> torch.Tensor:
    """Position of every token of a `grid` x `grid` image, row by row, the class token first: (1, 1 + grid^2,
    width).

    The first half of the channels encodes the column, the second half the row (MAE's order), each as sines
    and cosines of geometrically spaced frequencies from 1 to 1/10000; the class token's position is zero.
    float32, computed in float64. `width` must be a multiple of 4: ValueError.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, not {width}")
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(grid * grid, width)
    return torch.cat([torch.zeros_like(patches[:1]), patches])[None].float()
