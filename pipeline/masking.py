"""Which patches are visible: pure functions of uniform noise, so a mask can be had again from its sample's
key.

Invariant: equal noise gives equal masks on every device; ties in the noise are broken by position.
"""

import torch


def random_split(noise: torch.Tensor, num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MAE's random masking: the patches with the smallest noise are visible.

    noise (B, L) -> visible_ids (B, V), masked_ids (B, L - V), int64, both in the order of their noise.
    0 <= num_visible <= L, else ValueError.
    """
    num_patches = noise.shape[1]
    if not 0 <= num_visible <= num_patches:
        raise ValueError(f"{num_visible} visible patches of {num_patches}")
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def parallel_parts(noise: torch.Tensor, num_parts: int) -> torch.Tensor:
    """EMAE's parallel mask: all patches dealt into K parts of equal size, without overlap.

    noise (B, L) -> ids (B, K, L/K), int64: consecutive chunks of the patches in the order of their noise.
    Each part is what one view sees, so the mask ratio is 1 - 1/K. L not divisible by K: ValueError.
    """
    batch, num_patches = noise.shape
    if num_parts < 1 or num_patches % num_parts:
        raise ValueError(f"{num_patches} patches cannot be divided into {num_parts} parts of equal size")
    return noise.argsort(dim=1, stable=True).view(batch, num_parts, num_patches // num_parts)


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """tokens (B, L, D) at ids (B, M) -> (B, M, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def as_mask(ids: torch.Tensor, num_patches: int) -> torch.Tensor:
    """ids (..., M) in [0, L) -> bool (..., L), true at the ids."""
    mask = torch.zeros(*ids.shape[:-1], num_patches, dtype=torch.bool, device=ids.device)
    return mask.scatter(-1, ids, True)


def draw_windows(noise: torch.Tensor, grid: int, window: int, num_windows: int) -> torch.Tensor:
    """LoMaR's windows: noise (B, 2 x places) -> ids (B, num_windows, window^2), each window's patches row by
    row.

    places = grid - window + 1 positions along a side. As in LoMaR's code the windows' rows are drawn without
    repetition, and so are their columns; where there are more windows than places, both are gone through
    again.
    """
    places = grid - window + 1
    turn = torch.arange(num_windows, device=noise.device) % places
    top = noise[:, :places].argsort(dim=1, stable=True)[:, turn]
    left = noise[:, places:].argsort(dim=1, stable=True)[:, turn]
    return (top * grid + left)[:, :, None] + _window(grid, window, noise.device)


def tile_windows(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """The fewest windows that cover the image, the last ones moved in from the edge: ids (1, windows,
    window^2)."""
    start = torch.arange(0, grid, window, device=device).clamp(max=grid - window)
    corner = (start[:, None] * grid + start).flatten()
    return (corner[:, None] + _window(grid, window, device))[None]


def _window(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """(window^2,): positions of the patches of a window in the image's corner."""
    side = torch.arange(window, device=device)
    return (side[:, None] * grid + side).flatten()
