"""How hard a masked patch is to reconstruct: the measures of Efficient MAE, and the three it was compared
with.

"Efficient MAE towards Large-Scale Vision Transformers", Han et al., WACV 2024, Section 3.3 and Table 5.

Every measure is a difficulty d: larger is harder, 0 where visible, infinite where the measure sees no visible
patch at all. So one loss, weights d^-gamma, serves them all. Invariant: pure functions of the mask, without a
random number and without waiting for the device.
"""

from typing import Literal

import torch
from torch.nn import functional as F

Metric = Literal["p2dist", "neighbors_3x3", "inverse_distance_5x5", "nearest_patch"]


def difficulty(visible: torch.Tensor, patch_size: int, metric: Metric, exact: bool, k: int) -> torch.Tensor:
    """The measure that `metric` names: bool (B, H, W) -> float32 (B, H, W). `exact` and `k` are P2Dist's.

    p2dist is the paper's own; the others are rows (a), (b) and (c) of Table 5. (a) and (b) measure ease, so
    their difficulty is the inverse.
    """
    if metric == "p2dist":
        return patch_distance(visible, patch_size, exact, k)
    if metric == "neighbors_3x3":
        return 1 / _around(visible, radius=1, power=0)
    if metric == "inverse_distance_5x5":
        return 1 / _around(visible, radius=2, power=-1)
    if metric == "nearest_patch":
        return nearest_patch_distance(visible, patch_size)
    raise ValueError(f"difficulty metric {metric!r}: expected one of {', '.join(Metric.__args__)}")


def patch_distance(visible: torch.Tensor, patch_size: int, exact: bool = False, k: int = 8) -> torch.Tensor:
    """P2Dist, the patch-wise average nearest pixel distance: bool (B, H, W) -> float32 (B, H, W), in pixels.

    For a masked patch the mean over its pixels of the distance to the nearest visible one: Eq. 1 if `exact`,
    else Algorithm 1 with its `k` nearest boundary pixels. 0 where visible; infinite where an image shows
    nothing.
    """
    distance = _exact_distance(visible, patch_size) if exact else _boundary_distance(visible, patch_size, k)
    return distance.masked_fill(visible, 0.0)


def nearest_patch_distance(visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Table 5 (c): from a patch's centre to the nearest visible patch's, in pixels. (B, H, W), 0 where
    visible."""
    batch, rows, columns = visible.shape
    row, column = _cells(rows, columns, visible.device)
    between = torch.hypot(row[:, None] - row, column[:, None] - column) * patch_size  # (L, L)
    reachable = between.masked_fill(~visible.flatten(1)[:, None, :], torch.inf)
    return reachable.amin(dim=2).view(batch, rows, columns)


def _around(visible: torch.Tensor, radius: int, power: int) -> torch.Tensor:
    """Table 5 (a) and (b): sum over the visible patches in a square around a patch of their distance to a
    power.

    Distances between centres, in patches: power 0 counts the patches, power -1 adds the inverses. Infinite
    where visible itself, so that its inverse, the difficulty, is 0 there.
    """
    side = torch.arange(-radius, radius + 1, device=visible.device).float()
    distance = torch.hypot(side[:, None], side)
    kernel = distance.where(distance > 0, torch.inf).pow(power) if power else (distance > 0).float()
    total = F.conv2d(visible[:, None].float(), kernel[None, None], padding=radius)[:, 0]
    return total.masked_fill(visible, torch.inf)


def _cells(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every cell of a grid, row by row: two float32 (rows * columns)."""
    row = torch.arange(rows, device=device).float()[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).float().expand(rows, columns)
    return row.reshape(-1), column.reshape(-1)


def _exact_distance(visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Eq. 1 as a separable distance transform: first along the rows of patches, then across them.

    The nearest pixel of a visible patch differs from (y, x) by a row offset that depends on the patch's row
    alone and a column offset that depends on its column alone. So one minimum per row of patches is enough.
    """
    batch, rows, columns = visible.shape
    down = _offsets(rows, patch_size, visible.device)  # (H*P, H), pixels
    across = _offsets(columns, patch_size, visible.device)  # (W*P, W)
    hidden = ~visible
    nearest = visible.new_full(
        (batch, rows * patch_size, columns * patch_size), torch.inf, dtype=torch.float32
    )
    for row in range(rows):
        in_row = across.square().masked_fill(hidden[:, row, None, :], torch.inf).amin(dim=2)  # (B, W*P)
        nearest = torch.minimum(nearest, down[:, row].square()[:, None] + in_row[:, None, :])
    pixels = nearest.sqrt().view(batch, rows, patch_size, columns, patch_size)
    return pixels.mean(dim=(2, 4))


def _offsets(cells: int, patch_size: int, device: torch.device) -> torch.Tensor:
    """(cells * P, cells): along one axis, how far each pixel is from the nearest pixel of each patch."""
    pixel = torch.arange(cells * patch_size, device=device)[:, None]
    first = torch.arange(cells, device=device) * patch_size
    return torch.clamp(torch.maximum(first - pixel, pixel - (first + patch_size - 1)), min=0).float()


def _boundary_distance(visible: torch.Tensor, patch_size: int, k: int) -> torch.Tensor:
    """Algorithm 1: each visible patch is stood for by 9 points, its corners, edge centres and centre.

    These points lie on a lattice with half a patch between neighbours, which neighbouring patches share; S is
    a set, so a shared point counts once. Which points come first for a patch depends on the grid alone, so
    choosing the k nearest visible ones is choosing the k smallest ranks; points equally far rank in raster
    order.
    """
    batch, rows, columns = visible.shape
    on_lattice = visible.new_zeros((batch, 2 * rows + 1, 2 * columns + 1), dtype=torch.float32)
    on_lattice[:, 1::2, 1::2] = visible  # patch centres have odd coordinates
    shown = F.max_pool2d(on_lattice, kernel_size=3, stride=1, padding=1).flatten(1) > 0  # (B, points)

    point_row, point_column = _cells(2 * rows + 1, 2 * columns + 1, visible.device)
    row, column = _cells(rows, columns, visible.device)
    down = point_row - (2 * row + 1)[:, None]  # (L, points), from each patch's centre, in half patches
    across = point_column - (2 * column + 1)[:, None]
    order = (down.square() + across.square()).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1).float()
    ranked = torch.where(shown[:, None, :], rank, torch.inf)  # (B, L, points)
    smallest, chosen = ranked.topk(min(k, ranked.shape[2]), dim=2, largest=False)  # (B, L, k): the set S

    grid_cells = torch.arange(rows * columns, device=visible.device)[:, None]
    half = patch_size / 2
    down = (down * half)[grid_cells, chosen].masked_fill(smallest.isinf(), torch.inf)
    across = (across * half)[grid_cells, chosen]
    pixel = torch.arange(patch_size, device=visible.device) - (patch_size - 1) / 2
    nearest = down.new_full((*chosen.shape[:2], patch_size, patch_size), torch.inf)
    for point in range(chosen.shape[2]):
        square = (pixel - down[:, :, point, None]).square()[..., None]
        square = square + (pixel - across[:, :, point, None]).square()[..., None, :]
        nearest = torch.minimum(nearest, square)
    return nearest.sqrt().mean(dim=(2, 3)).view(batch, rows, columns)
