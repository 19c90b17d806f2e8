"""Synthetic JPEGs of every kind that decoders treat differently, as a shard set.

Invariant: the files are a function of (count, side): content that survives chroma subsampling, so that a wrong decoder
differs from a right one by more than the checks' bounds.
"""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("4:2:0", "4:4:4", "grey", "progressive 4:2:0", "progressive 4:4:4")
SUBSAMPLING = {"4:2:0": 2, "4:4:4": 0}
"""Pillow's numbers."""


def make_jpeg(number: int, side: int) -> bytes:
    """Return the `number`-th JPEG. Its kind is KINDS[number % 5]; every second size is odd."""
    generator = np.random.default_rng(number)
    height, width = (int(side * scale) // 2 * 2 - number // len(KINDS) % 2 for scale in generator.uniform(0.6, 1.2, 2))
    coarse = generator.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(-12, 13, (height, width, 1))  # photographs have texture, and about as many bytes
    image = Image.fromarray((np.asarray(image, np.int16) + noise).clip(0, 255).astype(np.uint8))
    kind = KINDS[number % len(KINDS)]
    if kind == "grey":
        image = image.convert("L")
    options = {} if kind == "grey" else {"subsampling": SUBSAMPLING[kind.split()[-1]]}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, progressive=kind.startswith("progressive"), **options)
    return file.getvalue()


def build_shard_set(folder: Path, count: int, side: int) -> Path:
    """Write `count` JPEGs and build a shard set of them with data_prep. Returns its directory.

    Args:
        side: Typical side of an image, in pixels.
    """
    photographs, shards = folder / "photographs", folder / "shards"
    for number in range(count):
        path = photographs / f"class-{number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(number, side))
    command = [sys.executable, "-m", "data_prep", "folder", str(photographs), str(shards)]
    shard_size = str(max(8, count // 4))
    subprocess.run([*command, "--shard-size", shard_size], check=True, capture_output=True, text=True)
    return shards
