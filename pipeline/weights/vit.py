"""What formats without a decoder are written from: a vision transformer in timm's terms.

Invariant: it says everything that the weights' library has to be told, so an encoder and a classifier are
exported by the same code.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.recipe.sections import DataSection, Size


class Vit(NamedTuple):
    """An encoder, or, where it has `classes`, a classifier by the mean of the patch tokens."""

    origin: str
    """What trained it: a method's name, or "finetune"."""
    size: Size
    patch_size: int
    data: DataSection
    """What images are to be like: image_size, mean and std."""
    resize: int
    """Pixels of their shorter side before the centre is cut out."""
    weights: dict[str, torch.Tensor]
    """Under timm's names."""
    ours: Callable[[torch.Tensor], torch.Tensor]
    """What our own model makes of images (B, 3, S, S): tokens (B, 1 + L, D), the class token first, or of a
    classifier logits (B, C)."""
    classes: tuple[str, ...] = ()
    """Their names, in the order of the logits."""
    descriptions: tuple[str, ...] = ()
    """Of the classes, for people; may be empty."""

    @property
    def output(self) -> str:
        """What comes out, in a word."""
        return "logits" if self.classes else "tokens"
