"""Helpers of the export tests: run the command and its model card, reference images, comparison."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from pipeline.__main__ import main

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def export(run: Path, out: Path, *options: str) -> dict:
    """Run the command, then the model card's Python code; return the names that the code defined."""
    assert main(["export", str(run), str(out), "--format", *options]) == 0
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    images = IMAGES.numpy() if options == ("onnx",) else IMAGES
    names = {"images": images, "image": photograph}
    with torch.inference_mode():
        exec(code.replace("OUT", str(out)), names)
    return names


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def preprocess(image: Image.Image) -> torch.Tensor:
    """Apply torchvision's evaluation transform to the image that the model card's code gets."""
    pixels = CenterCrop(48)(Resize(int(48 / 224 * 256), InterpolationMode.BICUBIC)(image))
    pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / std
