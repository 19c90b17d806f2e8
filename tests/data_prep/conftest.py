"""Photographs and helpers shared by these tests: real images, real processes, real archives."""

import io
import os
import subprocess
from pathlib import Path

import forkserver
import pytest
from PIL import Image


def _shipped_photographs() -> list[bytes]:
    """Crops of the photographs that ship inside scikit-learn, as JPEG files."""
    from sklearn.datasets import load_sample_images

    crops = []
    for picture in load_sample_images().images:
        for top in range(0, 400, 80):
            for left in range(0, 600, 100):
                buffer = io.BytesIO()
                Image.fromarray(picture[top : top + 190, left : left + 160]).save(buffer, "JPEG", quality=90)
                crops.append(buffer.getvalue())
    return crops


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """60 sound JPEG files of different content."""
    folder = os.environ.get("IMAGENET_SAMPLE_DIR")
    if not folder:
        return _shipped_photographs()
    paths = sorted(Path(folder).glob("*.JPEG"), key=lambda path: path.stat().st_size)
    return [path.read_bytes() for path in paths[50:110]]


@pytest.fixture
def image_folder(tmp_path, photographs) -> Path:
    """30 photographs in three class folders."""
    root = tmp_path / "images"
    for number, data in enumerate(photographs[:30]):
        path = root / ("ant", "bee", "cat")[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def data_prep():
    """Runs `python -m data_prep ARGUMENTS...` as a user would; returns exit code, output and errors."""

    def run(*arguments) -> subprocess.CompletedProcess:
        return forkserver.run(["-m", "data_prep", *arguments], timeout=300)

    return run
