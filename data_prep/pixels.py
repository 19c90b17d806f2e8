"""Decode, transform and encode pixels: libjpeg-turbo (simplejpeg) for JPEG, Pillow for other formats.

Invariant: every function returns the complete image or raises ImageError, never a partly decoded image.
Arrays are uint8 (height, width, 3), or (height, width, 1) for gray.
"""

import functools
import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

try:
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports] (optional)
except ImportError:
    HEIF = False
else:
    register_heif_opener()
    HEIF = True

ImageFile.LOAD_TRUNCATED_IMAGES = False  # Pillow's default; the invariant depends on it
Image.MAX_IMAGE_PIXELS = None  # Policy.max_pixels is checked instead, before anything is decoded

_UNKNOWN_SAMPLING = "Could not determine subsampling"
"""Error of libjpeg-turbo's TurboJPEG interface, not of its decoder, for 4:1:0 and other rare samplings."""
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


class ImageError(ValueError):
    """An image that cannot be used. `reason` is a short code for the quarantine, the message explains it."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decode_jpeg(data: bytes, width: int, height: int, gray: bool, shorter_side: int | None = None) -> np.ndarray:
    """Decode a JPEG of width x height pixels. Raises ImageError if that fails.

    With `shorter_side`, the size to which it will be shrunk, a large image is decoded at 1/2, 1/4 or 1/8, with at
    least twice that size, so that the resize filter determines the result.
    """
    factor = 1
    while shorter_side is not None and factor < 8 and min(width, height) >= 4 * factor * shorter_side:
        factor *= 2
    min_width, min_height = (width // factor, height // factor) if factor > 1 else (0, 0)
    colorspace = "GRAY" if gray else "RGB"
    try:
        return simplejpeg.decode_jpeg(data, colorspace, min_width=min_width, min_height=min_height, min_factor=factor)
    except Exception as error:
        if _UNKNOWN_SAMPLING in str(error):
            return _decode_with_pillow(data, gray)
        raise _undecodable(error) from error


def _decode_with_pillow(data: bytes, gray: bool) -> np.ndarray:
    """Decode a JPEG by the decoder of libjpeg-turbo, which does not report warnings to Pillow."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L" if gray else "RGB")).reshape(image.height, image.width, -1)
    except Exception as error:
        raise _undecodable(error) from error


def encode_jpeg(pixels: np.ndarray, quality: int, chroma: str) -> bytes:
    """Encode a JPEG; chroma "444" keeps the full color resolution, "420" halves it in both directions."""
    gray = pixels.shape[2] == 1
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(pixels, quality, "GRAY" if gray else "RGB", "Gray" if gray else chroma)


def decode_other(data: bytes, max_pixels: int) -> tuple[np.ndarray, list[str], int]:
    """Decode the first frame of any format that Pillow reads.

    Returns:
        Pixels, what was converted to get RGB or gray (kinds of repair), and the EXIF orientation (1 to 8).

    Raises:
        ImageError: If it cannot be decoded or is larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    raise too_large_error(image.width, image.height, max_pixels)
                image.load()
                try:
                    orientation = image.getexif().get(0x0112, 1)
                except Exception:
                    orientation = 1
                pixels, converted = _to_rgb_or_gray(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("undecodable", "no decoder recognises it") from error
    except Exception as error:  # on damaged data Pillow raises nearly any type
        raise _undecodable(error) from error
    return pixels, converted, orientation if orientation in range(1, 9) else 1


def too_large_error(width: int, height: int, max_pixels: int) -> ImageError:
    return ImageError("too_large", f"{width} x {height} px is more than the limit of {max_pixels:,} pixels")


def _undecodable(error: Exception) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError("undecodable", "not enough memory to decode it")
    # Object addresses would make two builds differ.
    return ImageError("undecodable", _ADDRESS.sub("", str(error) or type(error).__name__))


def _to_rgb_or_gray(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    converted = []
    if image.mode in ("CMYK", "YCCK"):
        converted.append("cmyk")
    if image.mode.startswith("I") or image.mode == "F":
        converted.append("16_bit")
        return _convert_high_depth(image), converted
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        converted.append("alpha")
        background = Image.new("RGBA", image.size, "white")  # colors under full transparency are undefined
        image = Image.alpha_composite(background, image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[:, :, None], converted
    return np.asarray(image.convert("RGB")), converted


def _convert_high_depth(image: Image.Image) -> np.ndarray:
    """Scale 16-bit and float gray by the full range, which is 0 to 1 for float if all values are in it."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("undecodable", "pixels that are not finite")
    top = 1.0 if image.mode == "F" and values.max() <= 1.0 else 255.0 if values.max() <= 255 else 65535.0
    return np.clip(np.rint(values / top * 255.0), 0, 255).astype(np.uint8)[:, :, None]


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and flip pixels as an EXIF orientation (1 to 8) demands."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def rotate(pixels: np.ndarray, degrees: int) -> np.ndarray:
    """Rotate counter-clockwise by a multiple of 90 degrees."""
    return np.rot90(pixels, degrees // 90)


def shrink(pixels: np.ndarray, shorter_side: int) -> np.ndarray:
    """Resize with Pillow's Lanczos filter to a shorter side of `shorter_side` pixels; never enlarge."""
    height, width = pixels.shape[:2]
    if min(height, width) <= shorter_side:
        return pixels
    scale = shorter_side / min(height, width)
    size = max(shorter_side, round(height * scale)), max(shorter_side, round(width * scale))
    return load_resizer()(pixels, size)


@functools.cache
def load_resizer():
    """Import and return the Lanczos function. Call it before forking, so that workers share its imports.

    From torch 2.15 on this is torch's kernel: within one level of 255 of Pillow in a fifth of the time.
    """
    import torch

    torch.set_num_threads(1)  # a build runs one process per core

    def resize_with_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
        small = torch.nn.functional.interpolate(image, size, mode="lanczos", antialias=True)
        return small[0].permute(1, 2, 0).numpy()

    try:
        resize_with_torch(np.zeros((2, 2, 3), np.uint8), (1, 1))
    except (NotImplementedError, ValueError):
        return _resize_with_pillow
    return resize_with_torch


def _resize_with_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1)
