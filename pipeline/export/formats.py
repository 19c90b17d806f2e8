"""The interface of an export format: write it, reload it with its library, show a user how to load it.

Invariant: `max_difference` reads only the exported folder; the reference outputs come from the trained model.
"""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import torch

from pipeline.errors import UserError, missing_package_error
from pipeline.losses import patchify
from pipeline.masking import gather_tokens
from pipeline.methods.method import Method
from pipeline.recipe import Recipe
from pipeline.recipe.sections import DataSection
from pipeline.tasks.loaded_classifier import LoadedClassifier
from pipeline.weights.run import LoadedRun

Exportable = LoadedRun | LoadedClassifier
Run = TypeVar("Run", bound=Exportable, contravariant=True)


class ExportFormat(NamedTuple, Generic[Run]):
    """One format."""

    write: Callable[[Run, Path], None]
    """Write the format's files to a folder."""
    max_difference: Callable[[Run, Path], float]
    """Reload the folder with the target library and return the `relative_difference` of its outputs.

    Raises UserError if the library does not use all weights."""
    usage: Callable[[Run], str]
    """Return Python code that loads the folder OUT, for the model card."""
    tags: tuple[str, ...]
    """Tags of the model card."""


def import_library(name: str) -> ModuleType:
    """Import an optional dependency. Raises UserError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise (missing_package_error(name) or error) from error


def check_images(data: DataSection) -> torch.Tensor:
    """Return the images of the comparison, (2, 3, S, S) float32, the same in every call."""
    shape = (2, 3, data.image_size, data.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def predict_patches(
    method: Method, images: torch.Tensor, visible_ids: torch.Tensor, masked_ids: torch.Tensor
) -> torch.Tensor:
    """Predict the patches at masked_ids (B, M) from those at visible_ids (B, V); returns (B, M, P*P*3)."""
    with torch.inference_mode():
        encoded = method.encoder(gather_tokens(patchify(images, method.patch_size), visible_ids), visible_ids)
        return method.get_submodule("decoder")(encoded, visible_ids, masked_ids)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value; NaN if either has NaN.

    Raises:
        UserError: If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise UserError(f"outputs have shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def mask_ratio(recipe: Recipe) -> float:
    """Return the share of patches that training masks, for MAE's formula int(patches * (1 - ratio))."""
    name = recipe.method.name
    if name == "emae":
        return mask_ratio_for(recipe.num_visible, recipe.num_patches)
    return getattr(recipe.method, name).mask_ratio


def mask_ratio_for(num_visible: int, num_patches: int) -> float:
    """Return a ratio for which int(num_patches * (1 - ratio)) is exactly num_visible."""
    ratio = 1 - num_visible / num_patches
    while int(num_patches * (1 - ratio)) < num_visible:
        ratio = math.nextafter(ratio, 0)
    return ratio
