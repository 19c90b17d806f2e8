"""Efficient MAE's Figures 3 and 4: how hard each masked patch is, and the error against that."""

import math

import numpy as np
import torch
from PIL import Image

from pipeline.difficulty import patch_distance
from pipeline.errors import UserError
from pipeline.losses import patch_error, patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Chart, Column, Scale, as_maps, cut, heat, render_grid
from pipeline.pictures.reconstruction import described, originals, reconstructed, seen_and_predicted
from pipeline.recipe import Recipe

MASKS = 16
"""Seeds whose masks the mean errors are taken over."""
FEWEST = 50
"""Patches that a point of the chart stands for, at least."""


def plot_difficulty(
    method: Method, recipe: Recipe, batch: torch.Tensor, seed: int
) -> tuple[Image.Image, str]:
    """P2Dist (Eq. 1) and error of each masked patch of photographs (B, 3, N S, N S), and the mean error by
    distance, over several masks; and its ends, in a sentence."""
    per_side, patch = batch.shape[-1] // recipe.data.image_size, recipe.model.patch_size
    squares, distances, errors = cut(batch, per_side), [], []
    for number in range(MASKS):
        _, result = reconstructed(method, squares, seed + number)
        if number == 0:
            first = result
        distances.append(distance_of(result, patch))
        errors.append(error_of(result, squares, recipe))
    shown = [as_maps(maps[0][:, 0], per_side).numpy() for maps in (distances, errors)]
    middles, means, bars = by_distance(torch.stack(distances), torch.stack(errors), patch / 2)
    if not middles:
        raise UserError(
            f"--kind difficulty: no distance has {FEWEST} masked patches, which a chart needs; give more "
            "photographs, or --tiles"
        )
    highest = [float(np.nanmax(shown[0])), float(np.nanpercentile(shown[1], 98))]
    side = batch.shape[-1]
    columns = [
        originals(batch, recipe),
        *seen_and_predicted(squares, first, 0, "", recipe, per_side),
        Column("difficulty", heat(shown[0], 0, highest[0], side)),
        Column("error", heat(shown[1], 0, highest[1], side)),
    ]
    unit = "squared error, normalised pixels" if recipe.method.normalize_targets else "squared error"
    scales = [
        Scale("P2Dist, pixels", "0", f"{highest[0]:.0f}"),
        Scale(unit, "0", f"{highest[1]:.2g}"),
    ]
    chart = Chart(f"mean {unit}", "P2Dist, pixels", middles, means, bars)
    caption = (
        f"{described(recipe, per_side)}. Difficulty: P2Dist, a masked patch's mean distance to what was "
        f"seen; seen patches are grey in the maps. The chart: means over {MASKS} masks of {len(batch)} "
        "photographs, with two standard errors."
    )
    sentence = f"mean error {means[0]:.3g} at {middles[0]:.3g} px, {means[-1]:.3g} at {middles[-1]:.3g} px"
    return render_grid(columns, caption, scales, chart), sentence


def distance_of(result: Reconstruction, patch_size: int) -> torch.Tensor:
    """Exact P2Dist of every patch for every view: float32 (B, K, L), pixels; NaN where visible."""
    batch, views, length = result.visible.shape
    grid = math.isqrt(length)
    visible = result.visible.reshape(batch * views, grid, grid)
    distance = patch_distance(visible, patch_size, exact=True).reshape(batch, views, length)
    return distance.masked_fill(result.visible, torch.nan)


def error_of(result: Reconstruction, squares: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """MAE's error of every patch for every view, on the target's scale: float32 (B, K, L); NaN where
    visible."""
    truth = patchify(squares, recipe.model.patch_size)[:, None].expand_as(result.pixels)
    error = patch_error(result.pixels, truth)
    if recipe.method.normalize_targets:  # the pixels were put back on the true patch's scale
        error = error / (truth.var(dim=-1) + 1e-6)
    return error.masked_fill(result.visible, torch.nan)


def by_distance(
    distance: torch.Tensor, error: torch.Tensor, width: float
) -> tuple[list[float], list[float], list[float]]:
    """Mean error by distance, in intervals of `width` pixels: mean distance, mean error, and two standard
    errors of each interval that holds enough patches; nothing where none does."""
    known = distance.isfinite()
    distance, error = distance[known], error[known]
    interval = (distance / width).long()
    middles, means, bars = [], [], []
    for number in interval.unique().tolist():
        inside = interval == number
        values = error[inside]
        if len(values) >= FEWEST:
            middles.append(distance[inside].mean().item())
            means.append(values.mean().item())
            bars.append(2 * values.std().item() / math.sqrt(len(values)))
    return middles, means, bars
