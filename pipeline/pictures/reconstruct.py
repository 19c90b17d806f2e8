"""`python -m pipeline reconstruct`: photographs through trained methods, as pictures.

Each kind of picture has a file of its own beside this one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.pictures import agreement, attention, difficulty_map, feature_pca, reconstruction
from pipeline.pictures.images import as_batch, open_images
from pipeline.weights.encoder import load_encoder
from pipeline.weights.run import LoadedRun, load_run

MOST_TILES = 16
KINDS = ("grid", "agreement", "difficulty", "attention", "features")


class Options(NamedTuple):
    """Of the pictures."""

    count: int = 8
    """Photographs, at most."""
    tiles: int = 1
    """Squares of the model's image size along a photograph's side. Attention and features are not cut up:
    they see the photograph whole, at that size."""
    seed: int = 0
    """Of the masks."""
    seeds: int = 3
    """Masks of each photograph that `agreement` compares."""


def reconstruct(
    runs: Sequence[Path], images: Sequence[Path], out: Path, kinds: Sequence[str], options: Options
) -> str:
    """Draw each kind of picture of each run; returns a line for each.

    out: a .png where there is one picture, else a folder for RUN-KIND.png. UserError for what cannot be read,
    before anything is drawn.
    """
    places = _places(runs, out, kinds)
    if options.tiles > MOST_TILES:
        raise UserError(f"--tiles {options.tiles}: at most {MOST_TILES}")
    if options.seeds < 2:
        raise UserError(f"--seeds {options.seeds}: two predictions or more can agree")
    if missing := [path for path in images if not path.exists()]:
        raise UserError(f"--images {missing[0]}: no such file or folder")
    if blocked := [above for place in places.values() for above in place.parents if above.is_file()]:
        raise UserError(f"--out {out}: {blocked[0]} is a file, so no folder can be there")
    photographs, said = open_images(images, options.count), []
    counted = f"{len(photographs)} photograph{'s' * (len(photographs) > 1)}"
    for run in runs:
        trained = load_run(run)
        data = trained.recipe.data
        batch = as_batch(photographs, data, options.tiles * data.image_size)
        for kind in kinds:
            place = places[run, kind]
            with _writing(place):
                place.parent.mkdir(parents=True, exist_ok=True)
            drawn, sentence = _draw(kind, run, trained, batch, options)
            with _writing(place):
                drawn.save(place)
            said.append(f"{place}: {counted} after step {trained.step}{sentence}")
    return "\n".join(said)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {place}: cannot be written: {error.strerror or error}; give another place"
        ) from None


def _draw(
    kind: str, run: Path, trained: LoadedRun, batch: torch.Tensor, options: Options
) -> tuple[Image.Image, str]:
    recipe, method, _ = trained
    if kind == "grid":
        return reconstruction.plot_reconstruction(method, recipe, batch, options.seed), ""
    if kind == "agreement":
        seeds = range(options.seed, options.seed + options.seeds)
        drawn, sentence = agreement.plot_agreement(method, recipe, batch, seeds)
    elif kind == "difficulty":
        drawn, sentence = difficulty_map.plot_difficulty(method, recipe, batch, options.seed)
    else:
        module = {"attention": attention, "features": feature_pca}[kind]
        drawn, sentence = module.picture(load_encoder(run, batch.shape[-1]), recipe.data, batch)
    return drawn, f"; {sentence}"


def _places(runs: Sequence[Path], out: Path, kinds: Sequence[str]) -> dict[tuple[Path, str], Path]:
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(runs) * len(kinds) > 1:
            raise UserError(f"--out {out}: a folder is needed for {len(runs) * len(kinds)} pictures")
        return {(runs[0], kinds[0]): out}
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)}: two runs of this name, whose pictures would be one")
    if (out.suffix.lower() in Image.registered_extensions() and not out.is_dir()) or out.is_file():
        raise UserError(f"--out {out}: give a folder, or a name that ends in .png")
    return {
        (run, kind): out / f"{name}-{kind}.png"
        for run, name in zip(runs, names, strict=True)
        for kind in kinds
    }
