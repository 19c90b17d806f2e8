"""Write the photographs of the demo: those in scikit-image and scikit-learn, and random crops of each.

    OUT/photographs/astronaut.jpg ...           the photographs
    OUT/crops/astronaut/astronaut_000.jpg ...   square crops; the folder is the label

Nothing is downloaded. Licenses, as the two packages state them: astronaut (NASA) and rocket (SpaceX) are in
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

CROPS_PER_PHOTOGRAPH = 80
CROP_SIDES = (0.2, 0.6)
"""Range of a crop's side, relative to the photograph's shorter side."""
MAX_CROP_SIZE = 256


def load_photographs() -> dict[str, np.ndarray]:
    """Return name -> pixels, (H, W, 3) uint8."""
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
    rng = random.Random(0)
    for name, pixels in load_photographs().items():
        photograph = Image.fromarray(pixels)
        (out / "photographs").mkdir(parents=True, exist_ok=True)
        photograph.save(out / "photographs" / f"{name}.jpg", quality=95)
        folder = out / "crops" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(CROPS_PER_PHOTOGRAPH):
            side = round(min(photograph.size) * rng.uniform(*CROP_SIDES))
            left, top = (rng.randint(0, length - side) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop.thumbnail((MAX_CROP_SIZE, MAX_CROP_SIZE), Image.Resampling.LANCZOS)
            crop.save(folder / f"{name}_{number:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
