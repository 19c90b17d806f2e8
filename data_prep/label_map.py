"""Check label maps: 8-bit PNG files whose pixels are class numbers, as in ADE20K.

Invariant: a map that passes has one 8-bit value per pixel of its image: 0 for "other", which training and evaluation
ignore, or the number of a class, from 1. Its bytes are never changed.
"""

import io
import struct
import warnings

import numpy as np
from PIL import Image

from data_prep.pixels import ImageError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGBA"}
_ONE_CHANNEL = (0, 3)


def check_label_map(data: bytes, width: int, height: int, num_classes: int) -> np.ndarray:
    """Return the class numbers in a label map, without 0, ascending.

    Args:
        data: The PNG file.
        width: Of the image that it belongs to, as the shard holds it; in pixels. So is `height`.
        num_classes: The largest allowed value.

    Raises:
        ImageError: If the map cannot be used; its reason is a code for the quarantine.
    """
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or len(data) < 26:
        raise ImageError("label_map_format", "the label map is not a PNG file")
    map_width, map_height, depth, color_type = struct.unpack(">IIBB", data[16:26])
    if depth != 8 or color_type not in _ONE_CHANNEL:
        kind = _COLOR_TYPES.get(color_type, f"color type {color_type}")
        raise ImageError("label_map_format", f"the label map is {depth}-bit {kind}, not 8-bit gray or palette")
    if (map_width, map_height) != (width, height):
        raise ImageError(
            "label_map_size", f"the label map is {map_width} x {map_height} px, its image {width} x {height}"
        )
    values = np.flatnonzero(np.bincount(decode_label_map(data).ravel(), minlength=256))
    if values[-1] > num_classes:
        raise ImageError("label_map_value", f"the label map has the value {values[-1]}, but {num_classes} classes")
    return values[values > 0]


def decode_label_map(data: bytes) -> np.ndarray:
    """Decode the values of an 8-bit map, uint8 (height, width); of a palette image, the indexes.

    Raises:
        ImageError: If it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.load()
                return np.asarray(image)
    except Exception as error:  # on damaged data Pillow raises nearly any type
        raise ImageError("label_map_damaged", f"the label map cannot be decoded ({error})") from error
