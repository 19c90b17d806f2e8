"""Frozen encoders: maps from an image to one feature vector.

Invariant: parameters have no gradient, and `digest` changes if anything that determines the features does.

    run, .safetensors, .pth, HF folder, random:RECIPE   class token of an encoder, or mean of its patch tokens
    pixels, pixels:SIZE                                 the image itself, 32 px or SIZE, as a baseline
"""

import hashlib
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder, load_encoder

Pool = Literal["class_token", "mean"]
PIXELS = "pixels"
PIXELS_SIZE = 32


class FrozenEncoder(nn.Module):
    """Base class: images (B, 3, S, S), normalized by `mean` and `std`, to features (B, width)."""

    name: str
    """For reports."""
    width: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and of all settings that determine the features."""
        return module_digest(self, self.name, self.image_size, self.mean, self.std)


class PooledTokens(FrozenEncoder):
    """A transformer's class token, which MAE's probe uses, or the mean of its patch tokens."""

    def __init__(self, encoder: ImageEncoder, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.name = f"{encoder.name}, {pool.replace('_', ' ')}"
        self.width = encoder.width
        self.image_size, self.mean, self.std = encoder.image_size, encoder.mean, encoder.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(images)
        return tokens[:, 0] if self.pool == "class_token" else tokens[:, 1:].mean(dim=1)

    @cached_property
    def digest(self) -> str:
        encoder = self.encoder
        settings = [self.name, encoder.heads, self.image_size, self.mean, self.std]
        if encoder.norm_eps != LAYER_NORM_EPS:  # a weights file of transformers
            settings.append(encoder.norm_eps)
        return module_digest(self, *settings)


class Pixels(FrozenEncoder):
    """The flattened image."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.name, self.image_size = f"pixels of {image_size} px", image_size
        self.width = 3 * image_size**2
        self.mean, self.std = DataSection().mean, DataSection().std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def module_digest(module: nn.Module, *settings: object) -> str:
    """Return the SHA-256 of a module's weights and of `settings`."""
    digest = hashlib.sha256(repr(settings).encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_frozen_encoder(weights: str, image_size: int | None, pool: Pool) -> FrozenEncoder:
    """Load the encoder that `weights` names (see above), frozen, on the CPU.

    Args:
        image_size: In pixels; None: the size the encoder was trained on, 32 for `pixels`.

    Raises:
        UserError: If the options contradict each other, or as `load_encoder`.
    """
    if weights.partition(":")[0] != PIXELS:
        return PooledTokens(load_encoder(weights, image_size), pool).requires_grad_(False).eval()
    size = weights.removeprefix(PIXELS).removeprefix(":")
    if pool != "class_token":
        raise UserError(f"--pool {pool}: pixels have no tokens; omit --pool")
    if size and image_size:
        raise UserError(f"--image-size {image_size}: --weights {weights} sets the size; omit one of them")
    size = size or str(image_size or PIXELS_SIZE)
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"--weights {weights}: expected pixels:SIZE, for example pixels:32")
    return Pixels(int(size))
