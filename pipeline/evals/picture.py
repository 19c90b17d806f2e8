"""The picture of what a method reconstructs: original, what it saw, what it made of that.

One row a photograph. MAE has one view; EMAE's K parts stand side by side, and the last column is, patch by
patch, the mean prediction of the parts that did not see it: nothing in it is copied from the original.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.random import Purpose, uniform
from pipeline.evals.photographs import to_pixels
from pipeline.losses import patchify
from pipeline.methods.method import Method
from pipeline.recipe import Recipe

GAP, HEADER, GREY = 6, 26, 0.5
TILE = 160
"""Pixels a tile is enlarged to at least, by a whole factor."""


def picture(method: Method, recipe: Recipe, batch: torch.Tensor, seed: int) -> Image.Image:
    """The grid for images (B, 3, N S, N S), on the method's device; the masks follow from `seed`.

    S is the model's image size. For N > 1 the method sees N x N squares of each image, one by one.
    """
    size, patch = recipe.data.image_size, recipe.model.patch_size
    per_side = batch.shape[-1] // size
    batch = _cut(batch, per_side)
    noise = torch.from_numpy(uniform(seed, Purpose.MASK, 0, np.arange(len(batch)), method.noise_size))
    result = method.reconstruct(batch, noise.to(batch.device))
    batch, result = batch.cpu(), type(result)(*(field.cpu() for field in result))
    patches = patchify(batch, patch)
    visible = result.visible[..., None]
    grey = (torch.full((3,), GREY) - torch.tensor(recipe.data.mean)) / torch.tensor(recipe.data.std)
    columns = [("original", batch)]
    views = result.pixels.shape[1]
    for k in range(views):
        seen = torch.where(visible[:, k], patches, grey.repeat(patch * patch))
        name = f" {k + 1}" if views > 1 else ""
        columns.append((f"seen{name}", _unpatchify(seen, patch)))
        columns.append((f"predicted{name}", _unpatchify(result.pixels[:, k], patch)))
    if views > 1:
        unseen = (~visible).float()
        mean = (result.pixels * unseen).sum(1) / unseen.sum(1).clamp(min=1)
        columns.append(("mean prediction", _unpatchify(mean, patch)))
    pixels = [(title, to_pixels(_join(squares, per_side), recipe.data)) for title, squares in columns]
    return _grid(pixels, size * per_side, _footnote(recipe, per_side))


def columns_of(grid: Image.Image, size: int) -> list[Image.Image]:
    """The columns of a picture of images of `size` pixels (N = 1), without their titles."""
    tile = size * max(1, -(-TILE // size))
    edges = range(GAP, grid.width - tile, tile + GAP)
    return [grid.crop((x, HEADER, x + tile, grid.height - HEADER - GAP)) for x in edges]


def _cut(images: torch.Tensor, per_side: int) -> torch.Tensor:
    """(B, 3, N S, N S) to (B N N, 3, S, S), row by row."""
    batch, channels, side, _ = images.shape
    size = side // per_side
    squares = images.reshape(batch, channels, per_side, size, per_side, size)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)


def _join(squares: torch.Tensor, per_side: int) -> torch.Tensor:
    """The inverse of `_cut`."""
    count, channels, size, _ = squares.shape
    images = squares.reshape(count // per_side**2, per_side, per_side, channels, size, size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, per_side * size, per_side * size)


def _unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, L, P*P*3) in patchify's order back to square images (B, 3, S, S)."""
    batch, length, _ = patches.shape
    grid = math.isqrt(length)
    tiles = patches.reshape(batch, grid, grid, patch_size, patch_size, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * patch_size, grid * patch_size)


def _footnote(recipe: Recipe, per_side: int) -> str:
    text = f"{recipe.method.name}, patches of {recipe.model.patch_size} px"
    if per_side > 1:
        text += f", each photograph in {per_side} x {per_side} squares of {recipe.data.image_size} px"
    if recipe.method.normalize_targets:
        text += "; targets are normalised: mean and contrast of each predicted patch are the original's"
    return text


def _grid(columns: list[tuple[str, np.ndarray]], size: int, footnote: str) -> Image.Image:
    scale = max(1, -(-TILE // size))
    tile, rows = size * scale, len(columns[0][1])
    width = len(columns) * (tile + GAP) + GAP
    canvas = Image.new("RGB", (width, HEADER + rows * (tile + GAP) + HEADER), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, (title, tiles) in enumerate(columns):
        x = GAP + column * (tile + GAP)
        draw.text((x + tile / 2, HEADER / 2), title, "black", font, anchor="mm")
        for row, pixels in enumerate(tiles):
            enlarged = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x, HEADER + row * (tile + GAP)))
    draw.text((GAP, canvas.height - HEADER / 2), footnote, "black", font, anchor="lm")
    return canvas
