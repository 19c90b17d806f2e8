"""Pixels on the CPU: Pillow's resize, and what follows it.

torch's resize of uint8 images is Pillow's arithmetic (bicubic, antialiased, rounded to a level), vectorised.
It and numpy let other threads run. A pool calls them for many images, each of its threads `one_thread` first.
"""

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from pipeline.recipe.sections import DataSection


def single_threaded() -> None:
    """Keep what torch computes in this thread to it; torch.set_num_threads would reach every thread's MKL."""
    torch.get_num_threads()  # where torch settles how many this thread would start, so that it does not later
    threadpool_limits(limits=1, user_api="openmp")


def resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """(h, w, 3) uint8 to (*size, 3) uint8."""
    channels_last = image.contiguous().permute(2, 0, 1)[None]
    return F.interpolate(channels_last, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def normalize(image: torch.Tensor, data: DataSection, out: torch.Tensor, mirror: int = 0) -> None:
    """Write (h, w, 3) uint8, mirrored or not, into `out`, (3, h, w) float32: less mean, over deviation."""
    levels, planes = image.numpy(), out.numpy()
    if mirror:
        levels = levels[:, ::-1]
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        np.multiply(levels[..., channel], np.float32(1 / (255 * std)), out=planes[channel])
        planes[channel] -= np.float32(mean / std)
