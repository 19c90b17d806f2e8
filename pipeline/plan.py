"""What a recipe costs, without running it: pure functions of the recipe and of the hardware's figures."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.methods import build_method
from pipeline.recipe import Recipe


def forward_flops(recipe: Recipe) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counted as two.

    Counted by torch on shapes alone (the meta device): matrix products and attention, as everybody counts
    them.
    """
    with torch.device("meta"), torch.no_grad():
        method = build_method(recipe)
        images = torch.empty(1, 3, recipe.data.image_size, recipe.data.image_size)
        noise = torch.empty(1, method.noise_size)
        with FlopCounterMode(display=False) as counter:
            method(images, noise)
    return counter.get_total_flops()
