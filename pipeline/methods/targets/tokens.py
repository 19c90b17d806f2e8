"""Visual tokens: the indices that the encoder of a discrete VAE assigns to the patches of an image.

"Zero-Shot Text-to-Image Generation", Ramesh et al., ICML 2021; used as targets by BEiT.
"""

from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

DOWNSAMPLING = 8
"""Pixels per token along a side, of DALL-E's encoder."""
CHUNK = 32
"""Images to encode at a time, to bound the memory: a tensor of DALL-E's encoder has 13 MB per image of 112 px."""
LOGIT_LAPLACE_EPS = 0.1
"""DALL-E's encoder takes pixels x in [0, 1] as (1 - 2 eps) x + eps."""


class Codebook(Protocol):
    """The interface of transformers' FlavaImageCodebook that is used."""

    def get_codebook_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, 8 h, 8 w) to tokens, int64 (B, h, w)."""
        ...


class Tokenizer:
    """Map images to one token per patch. No module, because its weights are not part of the method's.

    Args:
        mean, std: Of the three channels, by which images are normalized.
        grid: Patches along a side of the image.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], grid: int) -> None:
        self.codebook: nn.Module | None = None
        self.grid = grid
        self._mean_std = torch.tensor([mean, std])[:, :, None, None]

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self._mean_std = self._mean_std.to(device)
        if self.codebook is not None:
            self.codebook.to(device)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens of images (B, 3, H, W), normalized by mean and std: int64 (B, L).

        The image is resized so that a token covers a patch: BEiT's second view, 112 px for 14 x 14 patches.

        Raises:
            RuntimeError: If `codebook` is not set.
        """
        if images.is_meta:  # to count the operations of the method, which do not include the tokenizer's
            return torch.empty(len(images), self.grid**2, dtype=torch.int64, device="meta")
        if self.codebook is None:
            raise RuntimeError("the tokenizer has no weights; set `codebook` before the first batch")
        mean, std = self._mean_std
        pixels = (images.float() * std + mean).clamp(0, 1)
        side = self.grid * DOWNSAMPLING
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS
        codebook = cast(Codebook, self.codebook)
        return torch.cat([codebook.get_codebook_indices(part) for part in pixels.split(CHUNK)]).flatten(1)


def draw_tokens(tokens: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Draw tokens (...) as patches (..., P*P*3) of one color each, with values from -2 to 2.

    Neighboring tokens of the codebook have different colors: token t has the channels of frac(t x), for three
    irrational x.
    """
    steps = torch.tensor(
        [0.8191725, 0.6710436, 0.5497005], device=tokens.device
    )  # powers of the plastic number's inverse
    color = (tokens[..., None] * steps % 1) * 4 - 2
    return color.repeat(*[1] * tokens.ndim, patch_size**2)
