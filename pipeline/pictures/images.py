"""Photographs of a folder as a batch, the way evaluation sees them: shorter side resized, centre cropped."""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.reader import ShardReader
from pipeline.errors import UserError, join_names
from pipeline.recipe.sections import DataSection

logger = logging.getLogger(__name__)


def open_images(places: Sequence[Path], count: int) -> list[Image.Image]:
    """The first `count` images of files, and of folders and what is below, by name and one of each sub-folder
    in turn: upright, in RGB.

    Files in folders that are no images are passed over, and damaged images too, which is said. UserError
    where none is left, and for a file that was named and is none.
    """
    paths = [path for place in places for path in (_files_below(place) if place.is_dir() else [place])]
    images: list[Image.Image] = []
    damaged = []
    for path in paths:
        if len(images) == count:
            break
        try:
            with Image.open(path) as image:
                images.append(as_rgb(ImageOps.exif_transpose(image)))
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            if path in places:
                raise UserError(f"--images {path}: is no image that can be read") from None
            if path.suffix.lower() in Image.registered_extensions():
                damaged.append(f"{path} ({str(error).splitlines()[0]})")
    if damaged:
        logger.info(f"--images: passed over, as it cannot be read: {join_names(damaged)}")
    if not images:
        raise UserError(f"--images {', '.join(map(str, places))}: no image there that can be read")
    return images


def as_rgb(image: Image.Image) -> Image.Image:
    """As data_prep builds it into shards: grey of more than 8 bits by its full range, float from 0 to 1 where
    it stays inside, and what is transparent on white. ValueError where a pixel is not finite."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
        image = Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _files_below(folder: Path) -> list[Path]:
    met: Counter[Path] = Counter()
    turn: dict[Path, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        turn[path] = met[path.parent]
        met[path.parent] += 1
    return sorted(turn, key=turn.__getitem__)


def first_of_set(reader: ShardReader, count: int, data: DataSection) -> torch.Tensor:
    """The first `count` images of a shard set as a batch, the same at every call; what cannot be decoded is
    passed over. UserError where nothing is left."""
    images: list[Image.Image] = []
    for shard, size in enumerate(reader.shard_sizes.tolist()):
        for index in range(size):
            if len(images) == count:
                return as_batch(images, data, data.image_size)
            encoded = reader.read(shard, index)
            with contextlib.suppress(UnidentifiedImageError, OSError, SyntaxError, ValueError):
                images.append(Image.open(io.BytesIO(encoded)).convert("RGB"))
    if not images:
        raise UserError(f"{', '.join(reader.places)}: no image there that can be decoded")
    return as_batch(images, data, data.image_size)


def as_batch(images: list[Image.Image], data: DataSection, size: int) -> torch.Tensor:
    """RGB images of any shape to (B, 3, size, size) float32: the largest central square, normalised."""
    squares = [
        np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), np.float32)
        for image in images
    ]
    batch = (np.stack(squares) / 255 - np.array(data.mean, np.float32)) / np.array(data.std, np.float32)
    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def to_pixels(images: torch.Tensor, data: DataSection) -> np.ndarray:
    """Normalised images (..., 3, H, W) back to uint8 (..., H, W, 3)."""
    pixels = images.movedim(-3, -1) * torch.tensor(data.std) + torch.tensor(data.mean)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
