"""Color jitter: torchvision's ColorJitter(0.4, 0.4, 0.4), for MAE's Table 1 (e).

Brightness, contrast and saturation change by independent factors, in random order. MAE's paper does not give the
strength; 0.4 is that of BEiT's pre-training.
"""

import torch

from pipeline.data.transfer import copy_to_device

STRENGTH = 0.4
NUM_OPERATIONS = 3
NOISE_DIM = 2 * NUM_OPERATIONS
LUMA = (0.2989, 0.587, 0.114)
"""torchvision's weights of red, green and blue."""


def jitter_colors(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Jitter images (B, 3, H, W), float32 in [0, 1], given noise (B, NOISE_DIM).

    The first half of the noise gives the factors of brightness, contrast and saturation, from 1 - STRENGTH to
    1 + STRENGTH; the argsort of the second half is the order of the operations.
    """
    factors = 1 + STRENGTH * (2 * noise[:, :NUM_OPERATIONS] - 1)
    luma = copy_to_device(torch.tensor(LUMA), images.device)[:, None, None]
    for operation in noise[:, NUM_OPERATIONS:].argsort(dim=1, stable=True).unbind(1):
        factor = factors.gather(1, operation[:, None])[:, :, None, None]
        gray = (images * luma).sum(dim=1, keepdim=True)
        # Every operation blends with another image: black, the mean gray level, or the gray image.
        choices = torch.stack([torch.zeros_like(gray), gray.mean(dim=(2, 3), keepdim=True).expand_as(gray), gray])
        other = choices[operation, torch.arange(len(images), device=images.device)]
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images
