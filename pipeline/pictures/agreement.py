"""EMAE's Figure 4: one image behind several masks, and how much the predictions agree; with a number."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.losses import patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Scale, as_maps, cut, heat, render_grid
from pipeline.pictures.reconstruction import (
    described,
    normalised,
    originals,
    reconstructed,
    seen_and_predicted,
)
from pipeline.recipe import Recipe


class Agreement(NamedTuple):
    disagreement: float
    """Levels of 255; see `agreement`."""
    error: float
    """Levels of 255: the mean absolute difference of predictions from the truth. A model that always predicts
    the same agrees with itself; this says at what price."""
    by_patch: torch.Tensor
    """float32 (B, L): a patch's part of the disagreement; NaN where no two seeds predict it."""


def plot_agreement(
    method: Method, recipe: Recipe, batch: torch.Tensor, seeds: Sequence[int]
) -> tuple[Image.Image, str]:
    """The photographs (B, 3, N S, N S), behind each seed's masks; and the number, in a sentence."""
    per_side = batch.shape[-1] // recipe.data.image_size
    squares = cut(batch, per_side)
    results = [reconstructed(method, squares, seed)[1] for seed in seeds]
    found = agreement(squares, results, recipe)
    columns = [originals(batch, recipe)]
    for number, result in enumerate(results, 1):
        columns += seen_and_predicted(squares, result, 0, f", seed {number}", recipe, per_side)
    maps = as_maps(found.by_patch, per_side).numpy()
    highest = max(float(np.nanpercentile(maps, 99)), 1e-6)
    columns.append(columns[0]._replace(title="disagreement", tiles=heat(maps, 0, highest, batch.shape[-1])))
    number = (
        f"disagreement {found.disagreement:.2f}, error {found.error:.2f} levels of 255 "
        f"({len(seeds)} mask seeds, {len(batch)} photographs)"
    )
    caption = (
        f"{described(recipe, per_side)}{normalised(recipe)}. Mean {number}: how far two seeds' predictions "
        "of a patch that neither saw lie apart, and predictions from the original. Grey: not predicted twice."
    )
    scale = Scale("disagreement, levels of 255", "0", f"{highest:.0f}")
    return render_grid(columns, caption, [scale]), number


def agreement(squares: torch.Tensor, results: Sequence[Reconstruction], recipe: Recipe) -> Agreement:
    """How much the reconstructions of images (B, 3, S, S) behind several masks agree.

    For each pair of masks: the mean, over the pixels and channels of the patches that neither saw, of the
    absolute difference of the two predictions; averaged over pairs, then over images. In levels of 255, RGB.
    Of a method with several views (EMAE's parts) the first counts, so MAE and EMAE at one mask ratio see the
    same patches for the same seed. To compare methods: the same images, seeds and mask ratio, and all of them
    with normalised targets or none, because those are shown with the true patch's mean and contrast.
    """
    levels = 255 * torch.tensor(recipe.data.std).repeat(recipe.model.patch_size**2)
    truth = patchify(squares, recipe.model.patch_size)
    masked = [~result.visible[:, 0] for result in results]
    pixels = [result.pixels[:, 0] for result in results]
    per_pair, total, count = [], torch.zeros(truth.shape[:2]), torch.zeros(truth.shape[:2])
    for i, j in combinations(range(len(results)), 2):
        both = masked[i] & masked[j]
        difference = ((pixels[i] - pixels[j]).abs() * levels).mean(dim=2) * both
        per_pair.append(difference.sum(1) / both.sum(1).clamp(min=1))
        total, count = total + difference, count + both
    errors = [
        (((p - truth).abs() * levels).mean(dim=2) * m).sum(1) / m.sum(1)
        for p, m in zip(pixels, masked, strict=True)
    ]
    by_patch = torch.where(count > 0, total / count, torch.nan)
    return Agreement(torch.stack(per_pair).mean().item(), torch.stack(errors).mean().item(), by_patch)
