"""Read directories and encode and decode images, for comparisons."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def read_tree(directory: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file below a directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def encode_image(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
