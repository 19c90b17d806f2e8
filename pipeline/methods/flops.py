"""Floating-point operations of a method."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.methods import Method, build_method
from pipeline.recipe import Recipe


def forward_flops(recipe: Recipe, batch: int = 1, build: Callable[[Recipe], Method] = build_method) -> float:
    """Count the floating-point operations per image of a forward pass, a multiply-add counted as two.

    PyTorch's FLOP counter counts matrix products and attention, on the meta device. Work that is done once
    per forward pass is divided among its `batch` images. `build` builds the method.
    """
    return _forward_flops(recipe.with_micro_batch(1), batch, build)  # recipes that differ in it share a result


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
