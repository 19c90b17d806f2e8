"""Photographs for the demo: those inside scikit-image and scikit-learn, whole and cut into JPEG crops.

    OUT/photographs/astronaut.jpg ...           the photographs
    OUT/crops/astronaut/astronaut_000.jpg ...   random square crops of each; the folder is the label

Nothing is downloaded. Licences, as the two packages state them: astronaut (NASA) and rocket (SpaceX) are in
the public domain; cat (Stefan van der Walt) and coffee (Rachel Michetti) are CC0; china (danielbuechele) and
flower (vultilion, both on Flickr) are CC BY 2.0.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

CROPS = 80
"""A photograph."""
SIDES = (0.2, 0.6)
"""Side of a crop over the photograph's shorter side, from and to."""
LARGEST_SIDE = 256


def photographs() -> dict[str, np.ndarray]:
    """Name to (H, W, 3) uint8."""
    return {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "china": load_sample_image("china.jpg"),
        "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "rocket": data.rocket(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    chance = random.Random(0)
    for name, pixels in photographs().items():
        photograph = Image.fromarray(pixels)
        (out / "photographs").mkdir(parents=True, exist_ok=True)
        photograph.save(out / "photographs" / f"{name}.jpg", quality=95)
        folder = out / "crops" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(CROPS):
            side = round(min(photograph.size) * chance.uniform(*SIDES))
            left, top = (chance.randint(0, length - side) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
            crop.save(folder / f"{name}_{number:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
