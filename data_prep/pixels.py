"""Pixels in and out: libjpeg-turbo (simplejpeg) for JPEG, Pillow for everything else.

Invariant: every function either returns the whole picture as the file means it or raises ImageError; a
picture that is only partly there is never returned. Arrays are uint8 (height, width, 3), or (height, width,
1) for grey.
"""

import functools
import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF = False
else:
    register_heif_opener()
    HEIF = True

ImageFile.LOAD_TRUNCATED_IMAGES = False  # Pillow's default; it is what "whole" rests on
Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked before anything is decoded

_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


class ImageError(ValueError):
    """This image can't be used. `reason` is a short code, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def check_jpeg(data: bytes) -> None:
    """Decodes the whole file and drops the result. Raises ImageError.

    Only luma is transformed: every coded bit of every component is read all the same, and what can be wrong
    with a JPEG is wrong in those bits. It costs three quarters of a decode to RGB.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY")
    except Exception as error:
        raise _undecodable(error) from None


def decode_jpeg(
    data: bytes, width: int, height: int, grey: bool, shorter_side: int | None = None
) -> np.ndarray:
    """shorter_side: what the picture will be shrunk to. Large pictures are then decoded at 1/2, 1/4 or 1/8,
    never below twice that side, so that the filter still decides what is seen."""
    factor = 1
    while shorter_side is not None and factor < 8 and min(width, height) >= 4 * factor * shorter_side:
        factor *= 2
    scaled = {"min_width": width // factor, "min_height": height // factor, "min_factor": factor}
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", **(scaled if factor > 1 else {}))
    except Exception as error:
        raise _undecodable(error) from None


def encode_jpeg(pixels: np.ndarray, quality: int, chroma: str) -> bytes:
    """chroma: "444" keeps colour at full resolution, "420" halves it in both directions."""
    grey = pixels.shape[2] == 1
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(pixels, quality, "GRAY" if grey else "RGB", "Gray" if grey else chroma)


def decode_other(data: bytes, max_pixels: int) -> tuple[np.ndarray, list[str], int]:
    """Any format that Pillow reads (the first frame). Returns pixels, what had to be converted to get to RGB
    or grey, and the EXIF orientation (1 to 8)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    raise too_large(image.width, image.height, max_pixels)
                image.load()
                try:
                    orientation = image.getexif().get(0x0112, 1)
                except Exception:
                    orientation = 1
                pixels, converted = _to_rgb_or_grey(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("undecodable", "no decoder recognises it") from None
    except Exception as error:  # on damaged data Pillow's readers raise nearly every type there is
        raise _undecodable(error) from None
    return pixels, converted, orientation if orientation in range(1, 9) else 1


def too_large(width: int, height: int, max_pixels: int) -> ImageError:
    return ImageError("too_large", f"{width} x {height} px is more than the limit of {max_pixels:,} pixels")


def _undecodable(error: Exception) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError("undecodable", "not enough memory to decode it")
    # an object's address in a message would make two builds differ
    return ImageError("undecodable", _ADDRESS.sub("", str(error) or type(error).__name__))


def _to_rgb_or_grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    converted = []
    if image.mode in ("CMYK", "YCCK"):
        converted.append("cmyk")
    if image.mode.startswith("I") or image.mode == "F":
        converted.append("16_bit")
        return _high_depth(image), converted
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        converted.append("alpha")
        flat = Image.new("RGBA", image.size, "white")  # what lies under full transparency is undefined
        image = Image.alpha_composite(flat, image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[:, :, None], converted
    return np.asarray(image.convert("RGB")), converted


def _high_depth(image: Image.Image) -> np.ndarray:
    """16-bit and float grey by their full range; float is taken as 0 to 1 where it stays inside."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("undecodable", "pixels that are not finite")
    top = 1.0 if image.mode == "F" and values.max() <= 1.0 else 255.0 if values.max() <= 255 else 65535.0
    return np.clip(np.rint(values / top * 255.0), 0, 255).astype(np.uint8)[:, :, None]


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF's orientation (1 to 8) means it to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def rotate(pixels: np.ndarray, degrees: int) -> np.ndarray:
    """Counter-clockwise by a multiple of 90 degrees."""
    return np.rot90(pixels, degrees // 90)


def shrink(pixels: np.ndarray, shorter_side: int) -> np.ndarray:
    """By Pillow's Lanczos filter until the shorter side has `shorter_side` pixels; never enlarges."""
    height, width = pixels.shape[:2]
    if min(height, width) <= shorter_side:
        return pixels
    scale = shorter_side / min(height, width)
    size = max(shorter_side, round(height * scale)), max(shorter_side, round(width * scale))
    return _lanczos()(pixels, size)


@functools.cache
def _lanczos():
    """torch's kernel gives Pillow's pixels to one level of 255 in a fifth of the time, from torch 2.15 on."""
    import torch

    torch.set_num_threads(1)  # a builder already runs a process per core

    def by_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        small = torch.nn.functional.interpolate(image, size, mode="lanczos", antialias=True)
        return small[0].permute(1, 2, 0).numpy()

    try:
        by_torch(np.zeros((2, 2, 3), np.uint8), (1, 1))
    except (NotImplementedError, ValueError):
        return _lanczos_by_pillow
    return by_torch


def _lanczos_by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)).reshape(*size, -1)


def load_resizer() -> None:
    """Imports what `shrink` needs; once, before processes are forked that all need it."""
    _lanczos()
