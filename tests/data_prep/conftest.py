"""Fixtures of the data_prep tests: real images, real processes, real archives."""

import os
import subprocess
from pathlib import Path

import forkserver
import pytest
from file_contents import encode_image
from PIL import Image


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """60 different valid JPEG files, without IMAGENET_SAMPLE_DIR crops of scikit-learn's sample images."""
    folder = os.environ.get("IMAGENET_SAMPLE_DIR")
    if folder:
        paths = sorted(Path(folder).glob("*.JPEG"), key=lambda path: path.stat().st_size)
        return [path.read_bytes() for path in paths[50:110]]
    from sklearn.datasets import load_sample_images

    return [
        encode_image(Image.fromarray(image[top : top + 190, left : left + 160]), "JPEG", quality=90)
        for image in load_sample_images().images
        for top in range(0, 400, 80)
        for left in range(0, 600, 100)
    ]


@pytest.fixture
def image_folder(tmp_path, photographs) -> Path:
    """30 photographs in three class folders."""
    root = tmp_path / "images"
    for number, data in enumerate(photographs[:30]):
        path = root / ("ant", "bee", "cat")[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture(scope="session")
def data_prep():
    """Run `python -m data_prep ARGUMENTS...`; returns exit code, stdout and stderr."""

    def run(*arguments) -> subprocess.CompletedProcess:
        return forkserver.run(["-m", "data_prep", *arguments], timeout=300)

    return run
