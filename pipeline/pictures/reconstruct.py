"""`python -m pipeline reconstruct`: draw what trained methods make of images, one module per kind of picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.pictures.agreement import plot_agreement
from pipeline.pictures.attention import plot_attention
from pipeline.pictures.difficulty_map import plot_difficulty
from pipeline.pictures.feature_pca import plot_features
from pipeline.pictures.images import open_images, to_batch
from pipeline.pictures.reconstruction import plot_reconstruction
from pipeline.weights.encoder import load_encoder
from pipeline.weights.run import LoadedRun, load_run
from pipeline.weights.tokenizer import attach_tokenizer

MAX_TILES = 16
PIXEL_KINDS = "agreement", "difficulty"
"""Kinds that compare predicted pixels."""


def reconstruct(
    runs: list[Path], images: list[Path], out: Path, kinds: list[str], count: int, tiles: int, seed: int, seeds: int
) -> str:
    """Draw each kind of picture of each run and return a line for each.

    Args:
        images: Files and folders, of which the first `count` images are drawn.
        out: A .png for a single picture, else a folder for RUN-KIND.png.
        kinds: Among grid, agreement, difficulty, attention and features.
        tiles: Tiles of the model's image size along a side of an image. Attention and features use the whole image at
            that size instead.
        seed: Of the masks.
        seeds: Masks per image that `agreement` compares.

    Raises:
        UserError: If an argument is invalid, an input cannot be read or a picture cannot be written.
    """
    outputs = _output_paths(runs, out, kinds)
    if tiles > MAX_TILES:
        raise UserError(f"--tiles {tiles}: at most {MAX_TILES}")
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: agreement needs at least two")
    if missing := [path for path in images if not path.exists()]:
        raise UserError(f"--images {missing[0]}: no such file or folder")
    opened, lines = open_images(images, count), []
    for run in runs:
        loaded = load_run(run)
        if not loaded.method.target.is_image and (pixel_kinds := [kind for kind in kinds if kind in PIXEL_KINDS]):
            raise UserError(
                f"--kind {pixel_kinds[0]}: compares pixels, and {run} predicts {loaded.recipe.method.target.name}; use "
                "grid, attention or features"
            )
        attach_tokenizer(loaded.method, loaded.recipe)
        batch = to_batch(opened, loaded.recipe.data, tiles * loaded.recipe.data.image_size)
        for kind in kinds:
            path = outputs[run, kind]
            with _report_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            picture, summary = _draw(kind, run, loaded, batch, seed, seeds)
            with _report_write_errors(path):
                picture.save(path)
            plural = "s" if len(opened) > 1 else ""
            lines.append(f"{path}: {len(opened)} image{plural} after step {loaded.step}{summary}")
    return "\n".join(lines)


@contextmanager
def _report_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from error


def _draw(
    kind: str, run: Path, loaded: LoadedRun, batch: torch.Tensor, seed: int, seeds: int
) -> tuple[Image.Image, str]:
    recipe, method, _ = loaded
    if kind == "grid":
        return plot_reconstruction(method, recipe, batch, seed), ""
    if kind == "agreement":
        picture, summary = plot_agreement(method, recipe, batch, range(seed, seed + seeds))
    elif kind == "difficulty":
        picture, summary = plot_difficulty(method, recipe, batch, seed)
    else:
        plot = {"attention": plot_attention, "features": plot_features}[kind]
        picture, summary = plot(load_encoder(run, batch.shape[-1]), recipe.data, batch)
    return picture, f"; {summary}"


def _output_paths(runs: list[Path], out: Path, kinds: list[str]) -> dict[tuple[Path, str], Path]:
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(runs) * len(kinds) > 1:
            raise UserError(f"--out {out}: give a folder for {len(runs) * len(kinds)} pictures")
        return {(runs[0], kinds[0]): out}
    if (out.suffix.lower() in Image.registered_extensions() and not out.is_dir()) or out.is_file():
        raise UserError(f"--out {out}: give a folder, or a name that ends in .png")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        name = max(names, key=names.count)
        raise UserError(f"two runs are named {name}, so their pictures would overwrite each other")
    return {(run, kind): out / f"{name}-{kind}.png" for run, name in zip(runs, names, strict=True) for kind in kinds}
