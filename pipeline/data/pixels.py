"""Pixel operations on the CPU: image size, checks of JPEGs, Pillow's resize, normalization.

torch's resize of uint8 images is Pillow's arithmetic (bicubic, antialiased, rounded to integer levels),
vectorized. It and numpy release the GIL, so a thread pool can process the images of a batch in parallel; each
of its threads must call `limit_torch_to_calling_thread` first.
"""

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from threadpoolctl import threadpool_limits

from pipeline.recipe.sections import DataSection


def jpeg_size(encoded: np.ndarray) -> tuple[int, int]:
    """Read (width, height) from a JPEG header, before EXIF rotation. Raise ValueError if it is damaged."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        return int(width), int(height)
    except ValueError as error:
        try:  # simplejpeg rejects rare chroma subsamplings that DALI decodes
            with Image.open(io.BytesIO(encoded.data), formats=["JPEG"]) as image:
                return image.size
        except Exception:
            raise error from None


def can_decode(encoded: np.ndarray) -> bool:
    """Return whether Pillow decodes a JPEG to its end."""
    try:
        with Image.open(io.BytesIO(encoded.data), formats=["JPEG"]) as image:
            image.load()
    except Exception:  # Pillow raises many kinds
        return False
    return True


def known_good_jpeg() -> np.ndarray:
    """Return a JPEG, uint8 (bytes,), that every working decoder decodes: 64 x 48 pixels, baseline, 4:2:0."""
    gray = np.full((48, 64, 3), 128, np.uint8)
    return np.frombuffer(simplejpeg.encode_jpeg(gray, colorsubsampling="420"), np.uint8)


def limit_torch_to_calling_thread() -> None:
    """Run torch operators in the calling thread only; torch.set_num_threads would affect all threads."""
    torch.get_num_threads()  # makes torch initialize this thread's setting now and not override it later
    threadpool_limits(limits=1, user_api="openmp")


def resize(image: torch.Tensor, size: list[int], mode: str = "bicubic") -> torch.Tensor:
    """Resize (h, w, 3) uint8 to (*size, 3) uint8 by Pillow's "bicubic" or "bilinear" filter."""
    channels_last = image.contiguous().permute(2, 0, 1)[None]
    return F.interpolate(channels_last, size=size, mode=mode, antialias=True)[0].permute(1, 2, 0)


def normalize(image: torch.Tensor, data: DataSection, out: torch.Tensor, flip: int = 0) -> None:
    """Write (h, w, 3) uint8, flipped horizontally if `flip`, to (3, h, w) float32: (image - mean) / std."""
    levels, planes = image.numpy(), out.numpy()
    if flip:
        levels = levels[:, ::-1]
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        np.multiply(levels[..., channel], np.float32(1 / (255 * std)), out=planes[channel])
        planes[channel] -= np.float32(mean / std)
