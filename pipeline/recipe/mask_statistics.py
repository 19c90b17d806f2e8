"""Statistics of reconstruction difficulty over random masks.

Invariant: masks come from a fixed seed, so equal arguments give equal results in every process.
"""

from functools import lru_cache

import torch

from pipeline.difficulty import Metric, difficulty
from pipeline.masking import as_mask, random_split

NUM_MASKS = 256
MAX_PAIRS = 2_500_000
"""Pairs of patches to compute at a time, which limits the memory."""


@lru_cache
def sample_difficulties(
    grid: int, num_visible: int, patch_size: int, metric: Metric, exact: bool = False, num_nearest: int = 8
) -> torch.Tensor:
    """Compute the difficulty of the masked patches of NUM_MASKS random masks.

    Args:
        grid: Patches along one side of the image; L = grid^2.
        num_visible: V, visible patches of a mask.
        patch_size, metric, exact, num_nearest: As for `pipeline.difficulty.difficulty`.

    Returns:
        float32 (NUM_MASKS, L - V), on the CPU.
    """
    num_patches = grid * grid
    with torch.device("cpu"), torch.no_grad():
        noise = torch.rand(NUM_MASKS, num_patches, generator=torch.Generator().manual_seed(0))
        parts = []
        for part in noise.split(max(1, MAX_PAIRS // num_patches**2)):
            visible_ids, masked_ids = random_split(part, num_visible)
            visible = as_mask(visible_ids, num_patches).view(-1, grid, grid)
            parts.append(difficulty(visible, patch_size, metric, exact, num_nearest).flatten(1).gather(1, masked_ids))
    return torch.cat(parts)


def mean_kept_patches(difficulties: torch.Tensor, beta: float | None) -> float:
    """Return the mean number of masked patches per image that decoder masking keeps.

    Args:
        difficulties: (masks, M), as `sample_difficulties` returns them.
        beta: Threshold in pixels; None: every finite difficulty is kept.
    """
    kept = difficulties.isfinite() if beta is None else difficulties <= beta
    return kept.sum().item() / len(difficulties)
