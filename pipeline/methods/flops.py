"""Floating-point operations of a method."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.methods import build_method
from pipeline.recipe import Recipe


@lru_cache
def forward_flops(recipe: Recipe, batch: int = 1) -> float:
    """Floating-point operations of the forward pass, a multiply-add counted as two: an image's share where
    `batch` images, at least 1, go together. What a batch needs once, a single image pays alone.

    Counted by torch on shapes alone: matrix products and attention, as everybody counts them.
    """
    with torch.device("meta"), torch.no_grad():
        method = build_method(recipe)
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size)
        noise = torch.empty(batch, method.noise_size)
        with FlopCounterMode(display=False) as counter:
            method(images, noise)
    return counter.get_total_flops() / batch


def training_flops(forward: float) -> float:
    """Operations of one image's forward and backward pass, as MFU counts them: three forward passes.

    What activation checkpointing computes once more is none of them: PaLM (arXiv 2204.02311), appendix B.
    """
    return 3 * forward
