"""The picture of what a method reconstructs: original, what it saw, what it made of that.

One row a photograph. MAE has one view; EMAE's K parts stand side by side, and the last column is, patch by
patch, the mean prediction of the parts that did not see it: nothing in it is copied from the original.
"""

import numpy as np
import torch
from PIL import Image

from pipeline.data.philox import Purpose, uniform
from pipeline.losses import patchify
from pipeline.methods.method import Method, Reconstruction
from pipeline.pictures.canvas import Column, cut, join, render_grid, unpatchify
from pipeline.pictures.images import to_pixels
from pipeline.recipe import Recipe

GREY = 0.5
"""Of what is not seen, from 0 to 1."""


def plot_reconstruction(method: Method, recipe: Recipe, batch: torch.Tensor, seed: int) -> Image.Image:
    """The grid for images (B, 3, N S, N S), on the method's device; the masks follow from `seed`.

    S is the model's image size. For N > 1 the method sees N x N squares of each image, one by one.
    """
    per_side = batch.shape[-1] // recipe.data.image_size
    squares, result = reconstructed(method, cut(batch, per_side), seed)
    columns = [_column("original", squares, recipe, per_side)]
    views = result.pixels.shape[1]
    for k in range(views):
        name = f" {k + 1}" if views > 1 else ""
        columns += seen_and_predicted(squares, result, k, name, recipe, per_side)
    if views > 1:
        unseen = (~result.visible[..., None]).float()
        mean = (result.pixels * unseen).sum(1) / unseen.sum(1).clamp(min=1)
        mean = unpatchify(mean, recipe.model.patch_size)
        columns.append(_column("mean prediction", mean, recipe, per_side))
    return render_grid(columns, f"{described(recipe, per_side)}{normalised(recipe)}.")


def reconstructed(method: Method, squares: torch.Tensor, seed: int) -> tuple[torch.Tensor, Reconstruction]:
    """Images (B, 3, S, S) through the method, masked by `seed`; both come back on the CPU."""
    noise = torch.from_numpy(uniform(seed, Purpose.MASK, 0, np.arange(len(squares)), method.noise_size))
    result = method.reconstruct(squares, noise.to(squares.device))
    return squares.cpu(), Reconstruction(*(field.cpu() for field in result))


def seen_and_predicted(
    squares: torch.Tensor, result: Reconstruction, view: int, name: str, recipe: Recipe, per_side: int
) -> list[Column]:
    """Two columns: what a view saw, the rest in grey, and what it made of that."""
    patch = recipe.model.patch_size
    grey = (torch.full((3,), GREY) - torch.tensor(recipe.data.mean)) / torch.tensor(recipe.data.std)
    visible = result.visible[:, view, :, None]
    seen = torch.where(visible, patchify(squares, patch), grey.repeat(patch * patch))
    return [
        _column(f"seen{name}", unpatchify(seen, patch), recipe, per_side),
        _column(f"predicted{name}", unpatchify(result.pixels[:, view], patch), recipe, per_side),
    ]


def originals(batch: torch.Tensor, recipe: Recipe) -> Column:
    """The photographs (B, 3, H, W) as a column."""
    return Column("original", to_pixels(batch, recipe.data))


def described(recipe: Recipe, per_side: int) -> str:
    """The model, and how it saw the photographs, in words."""
    text = f"{recipe.method.name}, patches of {recipe.model.patch_size} px"
    if per_side > 1:
        text += f", each photograph in {per_side} x {per_side} squares of {recipe.data.image_size} px"
    return text


def normalised(recipe: Recipe) -> str:
    """What a caption must say where targets are normalised; else nothing."""
    if not recipe.method.normalize_targets:
        return ""
    return "; targets are normalised: mean and contrast of each predicted patch are the original's"


def _column(title: str, squares: torch.Tensor, recipe: Recipe, per_side: int) -> Column:
    return Column(title, to_pixels(join(squares, per_side), recipe.data))
