"""Small methods and random batches for tests."""

import torch
from torch import nn

from pipeline.methods import Method, build_method
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "model.decoder_width=16",
    "model.decoder_depth=2",
    "model.decoder_heads=2",
)

VOCABULARY = 11


class HashTokenizer(nn.Module):
    """Stand-in for trained weights: a token for each cell of 8 x 8 pixels, a function of its mean."""

    def get_codebook_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.avg_pool2d(pixel_values, 8).sum(1)
        return (cells * 1000).long() % VOCABULARY


def tiny_method(name: str, image_size: int, *overrides: str) -> Method:
    """Build a method with patches of 4 px and fixed random weights."""
    torch.manual_seed(0)
    return build_method(load_recipe(f"vitb16_{name}", [*SMALL, f"data.image_size={image_size}", *overrides]))


def random_batch(method: Method, size: int = 3, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images (size, 3, H, W) and noise (size, noise_size)."""
    side = method.grid * method.patch_size
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, side, side, generator=generator),
        torch.rand(size, method.noise_size, generator=generator),
    )


def unpatchify(patches: torch.Tensor, patch_size: int = 4) -> torch.Tensor:
    """Invert `patchify`: (B, L, P*P*3) -> (B, 3, H, W)."""
    grid = round(patches.shape[1] ** 0.5)
    pixels = patches.unflatten(1, (grid, grid)).unflatten(3, (patch_size, patch_size, 3))
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid * patch_size, grid * patch_size)
