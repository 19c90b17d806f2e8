"""A vision transformer in timm's terms, from which the formats without a decoder are written.

Invariant: a `Vit` holds everything that a target library needs, so encoders and classifiers share the export
code.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.models.timm_beit import BIAS_TABLE
from pipeline.recipe.sections import DataSection, VitSize


class Vit(NamedTuple):
    """An encoder, or, if it has `classes`, a classifier on the mean of the patch tokens."""

    origin: str
    """Name of the pre-training method, or "finetune"."""
    size: VitSize
    patch_size: int
    data: DataSection
    """Gives the image size, mean and std."""
    resize: int
    """Pixels of an image's shorter side before the center crop."""
    weights: dict[str, torch.Tensor]
    """State dict with timm's keys."""
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Our model: images (B, 3, S, S) to tokens (B, 1 + L, D), class token first, or to logits (B, C)."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the logits."""
    descriptions: tuple[str, ...] = ()
    """Readable names of the classes, or empty."""

    @property
    def is_beit(self) -> bool:
        """Return whether the model is timm's Beit instead of its VisionTransformer."""
        return BIAS_TABLE in self.weights

    @property
    def output_name(self) -> str:
        return "logits" if self.classes else "tokens"
