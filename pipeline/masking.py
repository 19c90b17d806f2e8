"""Random masks as pure functions of uniform noise.

Invariant: equal noise gives equal masks on every device; ties in the noise are broken by position.
"""

import math

import torch

MIN_BLOCK = 16
"""Smallest area of a block of `block_split`, in patches, unless fewer are left to mask (BEiT's setting)."""
MIN_BLOCK_ASPECT = 0.3
"""Smallest height over width of a block; its inverse is the largest (BEiT's setting)."""
MAX_SKIPPED = 10
"""After so many skipped blocks in a row, `block_split` masks no more blocks (BEiT's setting)."""
BLOCK_TRIES = 32
"""Blocks that `block_split` draws for an image. BEiT's code has no limit, but for 75 of 196 patches it draws 11 on
average and hardly ever more than 32."""


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


def grid_split(noise: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the top left patch of each 2 x 2 patches visible, MAE's grid-wise sampling.

    Args:
        noise: (B, L); it determines only the batch size and the device.
        grid: Patches along one side of the image, even; L = grid^2.

    Returns:
        visible_ids (B, L/4) and masked_ids (B, 3L/4), int64, both in raster order.
    """
    is_odd = torch.arange(grid, device=noise.device) % 2
    order = (is_odd[:, None] | is_odd).flatten().argsort(stable=True).expand(len(noise), -1)
    return order[:, : grid**2 // 4], order[:, grid**2 // 4 :]


def block_noise_size(grid: int) -> int:
    """Return the uniform numbers per image that `block_split` needs."""
    return grid**2 + 4 * BLOCK_TRIES


def block_split(noise: torch.Tensor, grid: int, num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split patches by block-wise masking ("BEiT", Bao et al., ICLR 2022, Algorithm 1) with an exact mask ratio.

    Patches that are left after the blocks of `mask_blocks` are drawn at random.

    Args:
        noise: (B, grid^2 + 4 BLOCK_TRIES).
        grid: Patches along one side of the image.
        num_visible: V.

    Returns:
        visible_ids (B, V) and masked_ids (B, L - V), int64, both in ascending order of noise.
    """
    patch_noise, block_noise = noise.split([grid**2, 4 * BLOCK_TRIES], dim=1)
    masked, _ = mask_blocks(block_noise, grid, grid**2 - num_visible)
    return random_split(patch_noise + masked.flatten(1), num_visible)


def mask_blocks(noise: torch.Tensor, grid: int, num_masked: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask blocks of patches in turn, at most `num_masked` patches.

    The area of a block is uniform from MIN_BLOCK to the number of patches that are left to mask, its aspect ratio
    log-uniform. A block that covers a whole side of the image, no new patch, or more new patches than are left is
    skipped; after MAX_SKIPPED such blocks in a row, the mask is complete.

    Args:
        noise: (B, 4 BLOCK_TRIES).
        grid: Patches along one side of the image.
        num_masked: Patches to mask, from 0 to grid^2.

    Returns:
        The mask, bool (B, grid, grid), and the areas of the blocks in patches, int64 (B, BLOCK_TRIES), 0 if skipped.
    """
    area, aspect, top, left = noise.double().unflatten(1, (4, BLOCK_TRIES)).unbind(1)  # (B, BLOCK_TRIES)
    aspect = (math.log(MIN_BLOCK_ASPECT) * (1 - 2 * aspect)).exp()
    index = torch.arange(grid, device=noise.device)
    masked = torch.zeros(len(noise), grid, grid, dtype=torch.bool, device=noise.device)
    num_skipped = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    areas = []
    for block in range(BLOCK_TRIES):
        num_left = num_masked - masked.sum(dim=(1, 2))
        target = MIN_BLOCK + (num_left - MIN_BLOCK) * area[:, block]
        height, width = (target * aspect[:, block]).sqrt().round(), (target / aspect[:, block]).sqrt().round()
        row, column = (top[:, block] * (grid - height + 1)).floor(), (left[:, block] * (grid - width + 1)).floor()
        in_rows = (index >= row[:, None]) & (index < (row + height)[:, None])
        in_columns = (index >= column[:, None]) & (index < (column + width)[:, None])
        inside = in_rows[:, :, None] & in_columns[:, None, :]
        num_new = (inside & ~masked).sum(dim=(1, 2))
        is_used = (height < grid) & (width < grid) & (num_new > 0) & (num_new <= num_left) & (num_skipped < MAX_SKIPPED)
        num_skipped = (num_skipped + 1) * ~is_used
        masked = masked | (inside & is_used[:, None, None])
        areas.append((height * width * is_used).long())
    return masked, torch.stack(areas, dim=1)


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


def pair_windows_as_released(windows: torch.Tensor, batch: int) -> torch.Tensor:
    """Pair images with shared windows as LoMaR's released code does: (K, S) -> (B, K, S).

    The code repeats the images as a whole, but lists the windows anew for each image, so copy j of image b is paired
    with window (b + j B) mod K. If K divides B, an image has one window K times, and images b and b + K share it.
    """
    num_windows = len(windows)
    image = torch.arange(batch, device=windows.device)
    copy = torch.arange(num_windows, device=windows.device)
    return windows[(image[:, None] + copy * batch) % num_windows]


def tile_windows(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """Cover the image with the fewest windows, the last ones shifted inward: int64 (1, K, window^2)."""
    start = torch.arange(0, grid, window, device=device).clamp(max=grid - window)
    corner = (start[:, None] * grid + start).flatten()
    return (corner[:, None] + _window_offsets(grid, window, device))[None]


def _window_offsets(grid: int, window: int, device: torch.device) -> torch.Tensor:
    """Image positions (window^2,) of the patches of the top left window."""
    side = torch.arange(window, device=device)
    return (side[:, None] * grid + side).flatten()
