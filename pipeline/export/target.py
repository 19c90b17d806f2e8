"""What an export format is: how to write it, how its library reads it back, and how a user does.

Invariant: `difference` sees nothing but the folder. What it compares with comes from the trained model.
"""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import torch

from pipeline.errors import UserError
from pipeline.losses import patchify
from pipeline.masking import gather_tokens
from pipeline.methods.method import Method
from pipeline.recipe import Recipe
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.sections import DataSection
from pipeline.weights.vit import Vit

CHECKED_IMAGES = 2


class Exportable(Protocol):
    """`pipeline.weights.run.Trained`, which has a decoder too, or `finetune.trained.TrainedClassifier`."""

    recipe: TrainingRecipe
    step: int

    @property
    def vit(self) -> Vit: ...


class Target(NamedTuple):
    """One format. Its folder's files are `write`'s; the model card comes beside them."""

    write: Callable[[Exportable, Path], None]
    difference: Callable[[Exportable, Path], float]
    """Largest relative difference (see `relative_difference`) between what the folder's model gives, loaded
    by its library, and what ours gives. UserError where the library cannot load it whole."""
    usage: Callable[[Exportable], str]
    """Python that loads the folder OUT, for the model card."""
    tags: tuple[str, ...]
    """Of the model card."""


def library(name: str) -> ModuleType:
    """Import a library that only some formats need. UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"this format needs the package {name}, which is not installed: pip install 'shardmae[export]'"
        ) from None


def check_images(data: DataSection) -> torch.Tensor:
    """Images for the comparison, (B, 3, S, S) float32, the same at every call."""
    size = data.image_size
    return torch.randn(CHECKED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(method: Method, images: torch.Tensor) -> torch.Tensor:
    """What our encoder makes of whole images: (B, 3, S, S) -> (B, 1 + L, D), the class token first."""
    with torch.inference_mode():
        return method.tokens(images)


def predictions(
    method: Method, images: torch.Tensor, visible_ids: torch.Tensor, masked_ids: torch.Tensor
) -> torch.Tensor:
    """What our decoder predicts at masked_ids (B, M) from the patches at visible_ids (B, V): (B, M,
    P*P*3)."""
    with torch.inference_mode():
        encoded = method.encoder(gather_tokens(patchify(images, method.patch_size), visible_ids), visible_ids)
        return method.decoder(encoded, visible_ids, masked_ids)


def relative_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest absolute difference over the largest absolute value of ours; NaN where either has one."""
    if theirs.shape != ours.shape:
        raise UserError(f"outputs are {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
    return ((theirs - ours).abs().max() / ours.abs().max()).item()


def mask_ratio(recipe: Recipe) -> float:
    """Share of an image's patches that the encoder does not see in training, as MAE's code rounds it."""
    name = recipe.method.name
    if name == "emae":
        return ratio_leaving(recipe.num_visible, recipe.num_patches)
    return {"mae": recipe.method.mae, "efficient_mae": recipe.method.efficient_mae}[name].mask_ratio


def ratio_leaving(visible: int, patches: int) -> float:
    """The mask ratio by which MAE's code and transformers, `int(patches * (1 - ratio))`, keep so many."""
    ratio = 1 - visible / patches
    while int(patches * (1 - ratio)) < visible:
        ratio = math.nextafter(ratio, 0)
    return ratio
