"""`python -m pipeline reconstruct`: photographs through a trained method, as a picture."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.evals.photographs import load_photographs
from pipeline.evals.picture import picture
from pipeline.trained import load_run

MOST_TILES = 16


def reconstruct(run: Path, images: Path, out: Path, count: int, tiles: int, seed: int) -> str:
    """Write the picture for the first `count` images of a folder; returns a sentence about it.

    Each is shown as `tiles` x `tiles` squares of the model's image size, reconstructed one by one.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: give a name that ends in .png")
    if tiles > MOST_TILES:
        raise UserError(f"--tiles {tiles}: at most {MOST_TILES}")
    if not images.exists():
        raise UserError(f"--images {images}: no such file or folder")
    trained = load_run(run)
    batch = load_photographs(images, count, trained.recipe.data, tiles * trained.recipe.data.image_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture(trained.method, trained.recipe, batch, seed).save(out)
    return f"{out}: {len(batch)} photographs after step {trained.step}"
