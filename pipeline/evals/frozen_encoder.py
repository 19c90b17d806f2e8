"""What is judged: a map from images to one vector each.

a run directory, .safetensors, .pth, random:RECIPE     an encoder's class token, or its patches' mean
pixels, pixels:SIZE                                    the image itself, 32 px or SIZE: the baseline
"""

import hashlib
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder, load_encoder

Pool = Literal["class_token", "mean"]
PIXELS = "pixels"
PIXELS_SIZE = 32


class FrozenEncoder(nn.Module):
    """`name`: for people. `width`: D. `image_size`, `mean` and `std`: of the images it takes."""

    name: str
    width: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def digest(self) -> str:
        """Of everything that decides what comes out."""
        return digest(self, self.name, self.image_size, self.mean, self.std)


class PooledTokens(FrozenEncoder):
    """MAE's own choice for the probe is the class token."""

    def __init__(self, encoder: ImageEncoder, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.name = f"{encoder.name}, {pool.replace('_', ' ')}"
        self.width = encoder.width
        self.image_size, self.mean, self.std = encoder.image_size, encoder.mean, encoder.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) -> (B, D)."""
        tokens = self.encoder(images)
        return tokens[:, 0] if self.pool == "class_token" else tokens[:, 1:].mean(dim=1)

    @cached_property
    def digest(self) -> str:
        return digest(self, self.name, self.encoder.heads, self.image_size, self.mean, self.std)


class Pixels(FrozenEncoder):
    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.name, self.image_size = f"pixels of {image_size} px", image_size
        self.width = 3 * image_size**2
        self.mean, self.std = DataSection().mean, DataSection().std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def digest(module: nn.Module, *about: object) -> str:
    """Of a module's weights, and what is said about it."""
    found = hashlib.sha256(repr(about).encode())
    for key, tensor in sorted(module.state_dict().items()):
        found.update(key.encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def load_frozen_encoder(weights: str, image_size: int | None, pool: Pool) -> FrozenEncoder:
    """What `weights` names (see above), frozen, on the CPU. UserError as `load_encoder`."""
    if weights.partition(":")[0] == PIXELS:
        given = weights.removeprefix(PIXELS).removeprefix(":")
        if pool != "class_token":
            raise UserError(f"--pool {pool}: pixels have no tokens; leave it out")
        if given and image_size:
            raise UserError(f"--image-size {image_size}: --weights {weights} has a size; leave one out")
        size = given or str(image_size or PIXELS_SIZE)
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--weights {weights}: expected pixels:SIZE, for example pixels:32")
        return Pixels(int(size))
    return PooledTokens(load_encoder(weights, image_size), pool).requires_grad_(False).eval()
