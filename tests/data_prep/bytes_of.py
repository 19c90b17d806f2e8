"""Bytes of directories and pictures, as the tests compare them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def picture_bytes(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
