"""Floating-point operations of a method."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.methods import Method, build_method
from pipeline.recipe import Recipe

MIN_EXTRAPOLATED_DEPTH = 16
"""Blocks from which on two counts of shallow encoders take less time than one of the whole."""


def forward_flops(recipe: Recipe, batch: int = 1, build: Callable[[Recipe], Method] = build_method) -> float:
    """Count the floating-point operations per image of a forward pass, a multiply-add counted as two.

    PyTorch's FLOP counter counts matrix products and attention, on the meta device. Work that is done once
    per forward pass is divided among its `batch` images. `build` builds the method.
    """
    recipe = recipe.with_micro_batch(1)  # recipes that differ in it share a result
    return extrapolate_depth(lambda shallow: _forward_flops(shallow, batch, build), recipe)


def extrapolate_depth(count: Callable[[Recipe], float], recipe: Recipe) -> float:
    """Return count(recipe) for a deep encoder from the counts for encoders of 2 and 3 blocks, which is faster.

    Exact if every further block of the encoder adds the same; only the first one may differ.
    """
    depth, shallow = recipe.model.size.depth, 2
    if depth < MIN_EXTRAPOLATED_DEPTH:
        return count(recipe)
    models = (recipe.model.model_copy(update={"depth": shallow + more}) for more in (0, 1))
    first, second = (count(recipe.model_copy(update={"model": model})) for model in models)
    return first + (depth - shallow) * (second - first)


@lru_cache
def _forward_flops(recipe: Recipe, batch: int, build: Callable[[Recipe], Method]) -> float:
    with torch.device("meta"), torch.no_grad():
        method = build(recipe)
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size)
        noise = torch.empty(batch, method.noise_size)
        with FlopCounterMode(display=False) as counter:
            method(images, noise)
    return counter.get_total_flops() / batch


def training_flops(forward: float) -> float:
    """Return the operations of a forward and backward pass as MFU defines them: three forward passes.

    Recomputation by activation checkpointing does not count: PaLM (arXiv 2204.02311), appendix B.
    """
    return 3 * forward
