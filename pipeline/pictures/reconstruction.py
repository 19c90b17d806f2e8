"""Picture of what a method reconstructs: original, visible patches, prediction; one image per row.

MAE has one view. EMAE's K parts are shown side by side; the last column is, patch by patch, the mean prediction of
the parts that did not see it.
"""

import numpy as np
import torch
from PIL import Image

from pipeline.data.philox import Purpose, uniform
from pipeline.losses import patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Column, join_tiles, render_grid, split_tiles, unpatchify
from pipeline.pictures.images import to_pixels
from pipeline.recipe import Recipe

MASKED_LEVEL = 0.5
"""Gray level, 0 to 1, of masked patches."""


def plot_reconstruction(method: Method, recipe: Recipe, batch: torch.Tensor, seed: int) -> Image.Image:
    """Draw the reconstructions of a batch.

    Args:
        method: Trained method.
        recipe: Its recipe.
        batch: (B, 3, N S, N S) on the method's device, S the model's image size. For N > 1 the method sees the
            N x N tiles of each image one by one.
        seed: Determines the masks.
    """
    per_side = batch.shape[-1] // recipe.data.image_size
    tiles, result = reconstruct_tiles(method, split_tiles(batch, per_side), seed)
    columns = [_column("original", tiles, recipe, per_side)]
    if not method.target.is_image:
        truth = method.draw_targets(split_tiles(batch, per_side)).cpu()
        columns.append(_column("target", unpatchify(truth, recipe.model.patch_size), recipe, per_side))
    views = result.pixels.shape[1]
    for view in range(views):
        suffix = f" {view + 1}" if views > 1 else ""
        columns += view_columns(tiles, result, view, suffix, recipe, per_side)
    if views > 1:
        masked = (~result.visible[..., None]).float()
        mean = (result.pixels * masked).sum(1) / masked.sum(1).clamp(min=1)
        mean = unpatchify(mean, recipe.model.patch_size)
        columns.append(_column("mean prediction", mean, recipe, per_side))
    return render_grid(columns, f"{model_caption(recipe, per_side)}{normalization_note(recipe)}.")


def reconstruct_tiles(method: Method, tiles: torch.Tensor, seed: int) -> tuple[torch.Tensor, Reconstruction]:
    """Reconstruct images (B, 3, S, S) behind the masks of `seed`; return both on the CPU."""
    noise = torch.from_numpy(uniform(seed, Purpose.MASK, 0, np.arange(len(tiles)), method.noise_size))
    result = method.reconstruct(tiles, noise.to(tiles.device))
    return tiles.cpu(), Reconstruction(*(field.cpu() for field in result))


def view_columns(
    tiles: torch.Tensor, result: Reconstruction, view: int, suffix: str, recipe: Recipe, per_side: int
) -> list[Column]:
    """Return two columns for a view: its visible patches, the rest gray, and its prediction."""
    patch = recipe.model.patch_size
    gray = (torch.full((3,), MASKED_LEVEL) - torch.tensor(recipe.data.mean)) / torch.tensor(recipe.data.std)
    visible = result.visible[:, view, :, None]
    seen = torch.where(visible, patchify(tiles, patch), gray.repeat(patch * patch))
    return [
        _column(f"visible{suffix}", unpatchify(seen, patch), recipe, per_side),
        _column(f"predicted{suffix}", unpatchify(result.pixels[:, view], patch), recipe, per_side),
    ]


def original_column(batch: torch.Tensor, recipe: Recipe) -> Column:
    """Return images (B, 3, H, W) as a column."""
    return Column("original", to_pixels(batch, recipe.data))


def model_caption(recipe: Recipe, per_side: int) -> str:
    """Describe the model and the tiling for a caption."""
    text = f"{recipe.method.name}, patches of {recipe.model.patch_size} px"
    if per_side > 1:
        text += f", each image in {per_side} x {per_side} tiles of {recipe.data.image_size} px"
    return text


def normalization_note(recipe: Recipe) -> str:
    """Return what a caption has to state if targets are normalized, else nothing."""
    if not recipe.method.normalize_targets:
        return ""
    return "; targets are normalized: each predicted patch has the original's mean and contrast"


def _column(title: str, tiles: torch.Tensor, recipe: Recipe, per_side: int) -> Column:
    return Column(title, to_pixels(join_tiles(tiles, per_side), recipe.data))
