"""Reconstruction difficulty of masked patches: P2Dist and the metrics of Table 5 of Efficient MAE.

"Efficient MAE towards Large-Scale Vision Transformers", Han et al., WACV 2024, Section 3.3 and Table 5.

Every metric returns a difficulty d: larger is harder, 0 for visible patches, infinite if the metric finds no
visible patch. One loss with weights d^-gamma therefore serves all of them. Invariant: pure functions of the
mask, without random numbers and without synchronizing with the device.
"""

from typing import Literal, get_args

import torch
from torch.nn import functional as F

Metric = Literal["p2dist", "neighbors_3x3", "inverse_distance_5x5", "nearest_patch"]


def difficulty(visible: torch.Tensor, patch_size: int, metric: Metric, exact: bool, num_nearest: int) -> torch.Tensor:
    """Compute the difficulty of every patch by a metric: bool (B, H, W) -> float32 (B, H, W).

    The metrics are the paper's own and, in this order, rows (a), (b) and (c) of Table 5. Rows (a) and (b)
    measure ease; their inverse is used. For the other arguments see `patch_distance`, whose k is num_nearest.

    Raises:
        ValueError: If `metric` is unknown.
    """
    if metric == "p2dist":
        return patch_distance(visible, patch_size, exact, num_nearest)
    if metric == "neighbors_3x3":
        return 1 / _sum_visible_neighbors(visible, radius=1, power=0)
    if metric == "inverse_distance_5x5":
        return 1 / _sum_visible_neighbors(visible, radius=2, power=-1)
    if metric == "nearest_patch":
        return nearest_patch_distance(visible, patch_size)
    raise ValueError(f"metric: {metric!r} is not one of {', '.join(get_args(Metric))}")


def patch_distance(visible: torch.Tensor, patch_size: int, exact: bool = False, k: int = 8) -> torch.Tensor:
    """Compute P2Dist, the mean distance of a masked patch's pixels to their nearest visible pixel.

    Args:
        visible: bool (B, H, W), a mask over the grid of patches.
        patch_size: P, in pixels.
        exact: Use Eq. 1 instead of Algorithm 1.
        k: Number of nearest boundary points in Algorithm 1.

    Returns:
        float32 (B, H, W), in pixels; 0 for visible patches, infinite if no patch of the image is visible.
    """
    distance = _exact_distance(visible, patch_size) if exact else _boundary_distance(visible, patch_size, k)
    return distance.masked_fill(visible, 0.0)


def nearest_patch_distance(visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Compute Table 5 (c), the distance in pixels to the nearest visible patch's center: (B, H, W)."""
    batch, rows, columns = visible.shape
    row, column = _grid_coordinates(rows, columns, visible.device)
    distance = torch.hypot(row[:, None] - row, column[:, None] - column) * patch_size  # (L, L)
    to_visible = distance.masked_fill(~visible.flatten(1)[:, None, :], torch.inf)
    return to_visible.amin(dim=2).view(batch, rows, columns)


def _sum_visible_neighbors(visible: torch.Tensor, radius: int, power: int) -> torch.Tensor:
    """Sum distance^power, in patches, over the visible patches in a square around each patch.

    Table 5 (a) has power 0, (b) power -1. Visible patches themselves are infinite, so that their difficulty,
    the inverse, is 0.
    """
    side = torch.arange(-radius, radius + 1, device=visible.device).float()
    distance = torch.hypot(side[:, None], side)
    kernel = distance.where(distance > 0, torch.inf).pow(power) if power else (distance > 0).float()
    total = F.conv2d(visible[:, None].float(), kernel[None, None], padding=radius)[:, 0]
    return total.masked_fill(visible, torch.inf)


def _grid_coordinates(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every cell of a grid in raster order: two float32 (rows * columns,)."""
    row = torch.arange(rows, device=device).float()[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).float().expand(rows, columns)
    return row.reshape(-1), column.reshape(-1)


def _exact_distance(visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Eq. 1 as a separable distance transform: along each row of patches, then across the rows.

    The offset from a pixel to the nearest pixel of a patch has a row component that depends only on the
    patch's row and a column component that depends only on its column, so one minimum per row is enough.
    """
    batch, rows, columns = visible.shape
    row_offset = _pixel_to_patch_offset(rows, patch_size, visible.device)  # (H*P, H)
    column_square = _pixel_to_patch_offset(columns, patch_size, visible.device).square()  # (W*P, W)
    masked = ~visible
    nearest = visible.new_full((batch, rows * patch_size, columns * patch_size), torch.inf, dtype=torch.float32)
    for row in range(rows):
        in_row = column_square.masked_fill(masked[:, row, None, :], torch.inf).amin(dim=2)  # (B, W*P)
        nearest = torch.minimum(nearest, row_offset[:, row].square()[:, None] + in_row[:, None, :])
    pixels = nearest.sqrt().view(batch, rows, patch_size, columns, patch_size)
    return pixels.mean(dim=(2, 4))


def _pixel_to_patch_offset(num_patches: int, patch_size: int, device: torch.device) -> torch.Tensor:
    """Distance in pixels of each pixel to the nearest pixel of each patch along one axis, (L*P, L)."""
    pixel = torch.arange(num_patches * patch_size, device=device)[:, None]
    first = torch.arange(num_patches, device=device) * patch_size
    return torch.clamp(torch.maximum(first - pixel, pixel - (first + patch_size - 1)), min=0).float()


def _boundary_distance(visible: torch.Tensor, patch_size: int, num_nearest: int) -> torch.Tensor:
    """Algorithm 1: a visible patch is represented by 9 points, its corners, edge centers and center.

    The points lie on a lattice of half patches. Neighboring patches share points; as S is a set, a shared
    point counts once. The order of the lattice points by distance from a patch depends only on the grid, so
    the k = num_nearest visible points nearest to it have the k smallest ranks among the visible ones. Ties rank in
    raster order.

    Pixels have the integer coordinates 0 to P - 1 and a patch's center is at P / 2, which the paper's numbers of
    patches imply. So pixels are not symmetric about the center, and flipping a mask changes distances slightly.
    """
    batch, rows, columns = visible.shape
    centers = visible.new_zeros((batch, 2 * rows + 1, 2 * columns + 1), dtype=torch.float32)
    centers[:, 1::2, 1::2] = visible  # patch centers have odd lattice coordinates
    is_visible = F.max_pool2d(centers, kernel_size=3, stride=1, padding=1).flatten(1) > 0  # (B, points)

    point_row, point_column = _grid_coordinates(2 * rows + 1, 2 * columns + 1, visible.device)
    row, column = _grid_coordinates(rows, columns, visible.device)
    down = point_row - (2 * row + 1)[:, None]  # (L, points), offset from the patch center in half patches
    across = point_column - (2 * column + 1)[:, None]
    order = (down.square() + across.square()).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1).float()
    visible_rank = torch.where(is_visible[:, None, :], rank, torch.inf)  # (B, L, points)
    count = min(num_nearest, visible_rank.shape[2])
    smallest, points = visible_rank.topk(count, dim=2, largest=False)  # S: (B, L, k)

    cell = torch.arange(rows * columns, device=visible.device)[:, None]
    half = patch_size / 2
    down = (down * half)[cell, points].masked_fill(smallest.isinf(), torch.inf)
    across = (across * half)[cell, points]
    pixel = torch.arange(patch_size, device=visible.device) - half
    nearest = down.new_full((*points.shape[:2], patch_size, patch_size), torch.inf)
    for point in range(points.shape[2]):
        square = (pixel - down[:, :, point, None]).square()[..., None]
        square = square + (pixel - across[:, :, point, None]).square()[..., None, :]
        nearest = torch.minimum(nearest, square)
    return nearest.sqrt().mean(dim=(2, 3)).view(batch, rows, columns)
