"""Random masks as pure functions of uniform noise.

Invariant: equal noise gives equal masks on every device; ties in the noise are broken by position.
"""

import torch


def random_split(noise: torch.Tensor, num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split patches by MAE's random masking: those with the smallest noise (B, L) are visible.

    Returns:
        visible_ids (B, V) and masked_ids (B, L - V), int64, both in ascending order of noise.

    Raises:
        ValueError: If `num_visible` is not in [0, L].
    """
    num_patches = noise.shape[1]
    if not 0 <= num_visible <= num_patches:
        raise ValueError(f"num_visible: {num_visible}; must be from 0 to {num_patches}")
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def parallel_parts(noise: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Divide all patches into K disjoint parts of equal size by noise (B, L), EMAE's parallel mask.

    Each part holds the visible patches of one view, so the mask ratio is 1 - 1/K.

    Returns:
        int64 (B, K, L/K): consecutive chunks of the patches in ascending order of noise.

    Raises:
        ValueError: If L is not divisible by K.
    """
    batch, num_patches = noise.shape
    if num_parts < 1 or num_patches % num_parts:
        raise ValueError(f"num_parts: {num_patches} patches cannot be divided into {num_parts} equal parts")
    return noise.argsort(dim=1, stable=True).view(batch, num_parts, num_patches // num_parts)


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Select from tokens (B, L, D) those at ids (B, M) -> (B, M, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def as_mask(ids: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Convert ids (..., M) in [0, L) to a bool mask (..., L) that is true at the ids."""
    mask = torch.zeros(*ids.shape[:-1], num_patches, dtype=torch.bool, device=ids.device)
    return mask.scatter(-1, ids, True)


def draw_windows(noise: torch.Tensor, grid: int, window: int, num_windows: int) -> torch.Tensor:
    """Draw LoMaR's windows at random.

    As in LoMaR's code, the top rows of an image's windows are drawn without repetition, and so are the left
    columns. With more windows than positions along a side, the drawn positions are used again.

    Args:
        noise: (B, 2 * (grid - window + 1)).
        grid: Patches along one side of the image.
        window: Patches along one side of a window.
        num_windows: K.

    Returns:
        int64 (B, K, window^2): image positions of each window's patches in raster order.
    """
    num_positions = grid - window + 1
    index = torch.arange(num_windows, device=noise.device) % num_positions
    top = noise[:, :num_positions].argsort(dim=1, stable=True)[:, index]
    left = noise[:, num_positions:].argsort(dim=1, stable=True)[:, index]
    return (top * grid + left)[:, :, None] + _window_offsets(grid, window, noise.device)


def tile_windows(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """Cover the image with the fewest windows, the last ones shifted inward: int64 (1, K, window^2)."""
    start = torch.arange(0, grid, window, device=device).clamp(max=grid - window)
    corner = (start[:, None] * grid + start).flatten()
    return (corner[:, None] + _window_offsets(grid, window, device))[None]


def _window_offsets(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """Image positions (window^2,) of the patches of the top left window."""
    side = torch.arange(window, device=device)
    return (side[:, None] * grid + side).flatten()
