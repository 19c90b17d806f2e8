"""Images for pictures, prepared as in evaluation: shorter side resized, center cropped, normalized."""

import contextlib
import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.data.reader import ShardReader
from pipeline.errors import UserError, join_names
from pipeline.recipe.sections import DataSection

logger = logging.getLogger(__name__)


def open_images(paths: Sequence[Path], count: int) -> list[Image.Image]:
    """Open the first `count` images of files and folders, upright, in RGB.

    Folders are searched recursively, by name, one file of each sub-folder in turn. Other files in them are ignored;
    damaged images are skipped with a log message.

    Raises:
        UserError: If no image is left, or if a file given by name is not an image.
    """
    images = [image for _, image in itertools.islice(iter_images(paths), count)]
    if not images:
        raise UserError(f"--images {', '.join(map(str, paths))}: no readable image found")
    return images


def iter_images(paths: Sequence[Path]) -> Iterator[tuple[str, Image.Image]]:
    """Yield the images of files and folders as `open_images`, with a unique name for each, without an extension."""
    damaged: list[str] = []
    names: Counter[str] = Counter()
    try:
        for file in [file for path in paths for file in (_list_folder(path) if path.is_dir() else [path])]:
            try:
                with Image.open(file) as image:
                    upright = to_rgb(ImageOps.exif_transpose(image))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                if file in paths:
                    raise UserError(f"--images {file}: not a readable image") from error
                if file.suffix.lower() in Image.registered_extensions():
                    damaged.append(f"{file} ({str(error).splitlines()[0]})")
                continue
            names[file.stem] += 1
            yield file.stem + f"-{names[file.stem]}" * (names[file.stem] > 1), upright
    finally:
        if damaged:
            logger.warning(f"--images: skipped unreadable {join_names(damaged)}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as data_prep does for shards.

    Gray of more than 8 bits is scaled by its full range, float by 1 if no value is larger; transparency becomes white.

    Raises:
        ValueError: If a pixel is not finite.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels are not finite")
        top = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
        image = Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _list_folder(folder: Path) -> list[Path]:
    """List files by name, alternating between the folders that hold them."""
    seen: Counter[Path] = Counter()
    turn: dict[Path, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        turn[path] = seen[path.parent]
        seen[path.parent] += 1
    return sorted(turn, key=turn.__getitem__)


def load_first_images(reader: ShardReader, count: int, data: DataSection) -> torch.Tensor:
    """Load the first `count` decodable images of a shard set as a batch.

    Raises:
        UserError: If none can be decoded.
    """
    images: list[Image.Image] = []
    for shard, size in enumerate(reader.shard_sizes.tolist()):
        for index in range(size):
            if len(images) == count:
                return to_batch(images, data, data.image_size)
            encoded = reader.read(shard, index)
            with contextlib.suppress(OSError, SyntaxError, ValueError):
                images.append(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
    if not images:
        raise UserError(f"{', '.join(reader.paths)}: no image can be decoded")
    return to_batch(images, data, data.image_size)


def to_batch(images: list[Image.Image], data: DataSection, size: int) -> torch.Tensor:
    """Crop the largest central square of RGB images: (B, 3, size, size) float32, normalized."""
    squares = [np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), np.float32) for image in images]
    batch = (np.stack(squares) / 255 - np.array(data.mean, np.float32)) / np.array(data.std, np.float32)
    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def to_pixels(images: torch.Tensor, data: DataSection) -> np.ndarray:
    """Invert the normalization of images (..., 3, H, W): uint8 (..., H, W, 3)."""
    pixels = images.movedim(-3, -1) * torch.tensor(data.std) + torch.tensor(data.mean)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
