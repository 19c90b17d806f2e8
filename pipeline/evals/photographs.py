"""Photographs of a folder as a batch, the way evaluation sees them: shorter side resized, centre cropped."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import UserError
from pipeline.recipe import DataSection


def load_photographs(folder: Path, count: int, data: DataSection) -> torch.Tensor:
    """The first `count` images in the folder and below, by name: (B, 3, S, S) float32, normalised.

    S is the recipe's image size. Files that are no images are passed over. UserError where none is left.
    """
    if not folder.exists():
        raise UserError(f"--images {folder}: no such file or folder")
    paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
    images = []
    for path in paths:
        if len(images) == count:
            break
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(
                    ImageOps.exif_transpose(image).convert("RGB"),
                    (data.image_size, data.image_size),
                    Image.Resampling.BICUBIC,
                )
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        images.append(np.asarray(square, np.float32) / 255)
    if not images:
        raise UserError(f"--images {folder}: no image there that can be read")
    batch = (np.stack(images) - np.array(data.mean, np.float32)) / np.array(data.std, np.float32)
    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def to_pixels(images: torch.Tensor, data: DataSection) -> np.ndarray:
    """Normalised images (..., 3, H, W) back to uint8 (..., H, W, 3)."""
    pixels = images.movedim(-3, -1) * torch.tensor(data.std) + torch.tensor(data.mean)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
