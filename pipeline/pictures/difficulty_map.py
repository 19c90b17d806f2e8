"""Difficulty of each masked patch and error by difficulty (Efficient MAE's Figures 3 and 4)."""

import math
from itertools import chain

import numpy as np
import torch
from PIL import Image

from pipeline.difficulty import patch_distance
from pipeline.errors import UserError
from pipeline.losses import patch_error, patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Chart, Column, Scale, heatmap, render_grid, split_tiles, to_maps
from pipeline.pictures.reconstruction import model_caption, original_column, reconstruct_tiles, view_columns
from pipeline.recipe import Recipe

NUM_MASKS = 16
"""Masks per image that the chart averages over."""
MIN_PATCHES = 50
"""Patches that a point of the chart needs."""


def plot_difficulty(method: Method, recipe: Recipe, batch: torch.Tensor, seed: int) -> tuple[Image.Image, str]:
    """Draw P2Dist (Eq. 1) and error of the masked patches of images (B, 3, N S, N S).

    Returns:
        The picture, with a chart of the mean error by distance, and the chart's ends in words.

    Raises:
        UserError: If there are too few masked patches for the chart.
    """
    per_side, patch = batch.shape[-1] // recipe.data.image_size, recipe.model.patch_size
    tiles, distances, errors = split_tiles(batch, per_side), [], []
    _, first = reconstruct_tiles(method, tiles, seed)
    others = (reconstruct_tiles(method, tiles, seed + number)[1] for number in range(1, NUM_MASKS))
    for result in chain([first], others):
        distances.append(masked_distances(result, patch))
        errors.append(masked_errors(result, tiles, recipe))
    x, means, bars = mean_error_by_distance(torch.stack(distances), torch.stack(errors), patch / 2)
    if not x:
        raise UserError(
            f"--kind difficulty: the chart needs {MIN_PATCHES} masked patches at one distance; give more "
            "images or --tiles"
        )
    distance_map, error_map = (to_maps(maps[0][:, 0], per_side).numpy() for maps in (distances, errors))
    max_distance, max_error = float(np.nanmax(distance_map)), float(np.nanpercentile(error_map, 98))
    side = batch.shape[-1]
    columns = [
        original_column(batch, recipe),
        *view_columns(tiles, first, 0, "", recipe, per_side),
        Column("difficulty", heatmap(distance_map, 0, max_distance, side)),
        Column("error", heatmap(error_map, 0, max_error, side)),
    ]
    unit = "squared error, normalized pixels" if recipe.method.normalize_targets else "squared error"
    scales = [Scale("P2Dist, pixels", "0", f"{max_distance:.0f}"), Scale(unit, "0", f"{max_error:.2g}")]
    chart = Chart(f"mean {unit}", "P2Dist, pixels", x, means, bars)
    caption = (
        f"{model_caption(recipe, per_side)}. Difficulty: P2Dist, the mean distance of a masked patch to the "
        f"visible ones. Gray: visible. Chart: mean over {NUM_MASKS} masks of {len(batch)} images, with two "
        "standard errors."
    )
    summary = f"mean error {means[0]:.3g} at {x[0]:.3g} px, {means[-1]:.3g} at {x[-1]:.3g} px"
    return render_grid(columns, caption, scales, chart), summary


def masked_distances(result: Reconstruction, patch_size: int) -> torch.Tensor:
    """Return exact P2Dist of every patch in every view, in pixels: float32 (B, K, L), NaN if visible."""
    batch, views, length = result.visible.shape
    grid = math.isqrt(length)
    visible = result.visible.reshape(batch * views, grid, grid)
    distance = patch_distance(visible, patch_size, exact=True).reshape(batch, views, length)
    return distance.masked_fill(result.visible, torch.nan)


def masked_errors(result: Reconstruction, tiles: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the loss of every patch in every view: float32 (B, K, L), NaN if visible."""
    truth = patchify(tiles, recipe.model.patch_size)[:, None].expand_as(result.pixels)
    error = patch_error(result.pixels, truth)
    if recipe.method.normalize_targets:  # `pixels` are denormalized
        error = error / (truth.var(dim=-1) + 1e-6)
    return error.masked_fill(result.visible, torch.nan)


def mean_error_by_distance(
    distance: torch.Tensor, error: torch.Tensor, width: float
) -> tuple[list[float], list[float], list[float]]:
    """Average the errors in intervals of `width` pixels of distance; NaN distances are ignored.

    Returns:
        Mean distance, mean error and two standard errors of each interval with at least MIN_PATCHES patches.
    """
    known = distance.isfinite()
    distance, error = distance[known], error[known]
    interval = (distance / width).long()
    x, means, bars = [], [], []
    for number in interval.unique().tolist():
        inside = interval == number
        values = error[inside]
        if len(values) >= MIN_PATCHES:
            x.append(distance[inside].mean().item())
            means.append(values.mean().item())
            bars.append(2 * values.std().item() / math.sqrt(len(values)))
    return x, means, bars
