"""Reconstructions of one image behind several masks and how much they agree (EMAE's Figure 4)."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.losses import patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Scale, heatmap, render_grid, split_tiles, to_maps
from pipeline.pictures.reconstruction import (
    model_caption,
    normalization_note,
    original_column,
    reconstruct_tiles,
    view_columns,
)
from pipeline.recipe import Recipe


class SeedDisagreement(NamedTuple):
    """In levels of 255."""

    disagreement: float
    error: float
    """Mean absolute difference between predictions and original. A constant prediction agrees with itself, so
    disagreement is only meaningful beside it."""
    by_patch: torch.Tensor
    """Disagreement of each patch, float32 (B, L); NaN for patches that fewer than two seeds predict."""


def plot_agreement(
    method: Method, recipe: Recipe, batch: torch.Tensor, seeds: Sequence[int]
) -> tuple[Image.Image, str]:
    """Draw images (B, 3, N S, N S) behind each seed's masks; return the picture and its numbers in words."""
    per_side = batch.shape[-1] // recipe.data.image_size
    tiles = split_tiles(batch, per_side)
    results = [reconstruct_tiles(method, tiles, seed)[1] for seed in seeds]
    agreement = measure_agreement(tiles, results, recipe)
    columns = [original_column(batch, recipe)]
    for number, result in enumerate(results, 1):
        columns += view_columns(tiles, result, 0, f", seed {number}", recipe, per_side)
    maps = to_maps(agreement.by_patch, per_side).numpy()
    highest = max(float(np.nanpercentile(maps, 99)), 1e-6)
    columns.append(columns[0]._replace(title="disagreement", tiles=heatmap(maps, 0, highest, batch.shape[-1])))
    numbers = (
        f"disagreement {agreement.disagreement:.2f}, error {agreement.error:.2f} levels of 255 "
        f"({len(seeds)} mask seeds, {len(batch)} images)"
    )
    caption = (
        f"{model_caption(recipe, per_side)}{normalization_note(recipe)}. Mean {numbers}. Disagreement: "
        "difference between two seeds' predictions of a patch that is masked in both. Error: difference from "
        "the original. Gray: predicted fewer than two times."
    )
    scale = Scale("disagreement, levels of 255", "0", f"{highest:.0f}")
    return render_grid(columns, caption, [scale]), numbers


def measure_agreement(tiles: torch.Tensor, results: Sequence[Reconstruction], recipe: Recipe) -> SeedDisagreement:
    """Measure how much the reconstructions of images (B, 3, S, S) behind several masks agree.

    For each pair of masks: the mean absolute difference of the two predictions, over the pixels and channels of
    the patches masked in both; averaged over pairs, then over images. Of a method with several views (EMAE's
    parts) the first counts, so MAE and EMAE at one mask ratio see the same patches for the same seed.
    """
    levels = 255 * torch.tensor(recipe.data.std).repeat(recipe.model.patch_size**2)
    truth = patchify(tiles, recipe.model.patch_size)
    masked = [~result.visible[:, 0] for result in results]
    pixels = [result.pixels[:, 0] for result in results]
    per_pair, total, count = [], torch.zeros(truth.shape[:2]), torch.zeros(truth.shape[:2])
    for i, j in combinations(range(len(results)), 2):
        both = masked[i] & masked[j]
        difference = ((pixels[i] - pixels[j]).abs() * levels).mean(dim=2) * both
        per_pair.append(difference.sum(1) / both.sum(1).clamp(min=1))
        total, count = total + difference, count + both
    errors = [
        (((p - truth).abs() * levels).mean(dim=2) * m).sum(1) / m.sum(1) for p, m in zip(pixels, masked, strict=True)
    ]
    by_patch = torch.where(count > 0, total / count, torch.nan)
    return SeedDisagreement(torch.stack(per_pair).mean().item(), torch.stack(errors).mean().item(), by_patch)
