"""Unusual and damaged files as in real image archives, made from a valid photograph."""

import io
import struct

import numpy as np
from file_contents import encode_image
from PIL import Image


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def huge_header(photograph: bytes, side: int = 30_000) -> bytes:
    """Return a JPEG whose frame header claims side x side pixels."""
    place = next(i for i in range(len(photograph)) if photograph[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return photograph[: place + 5] + struct.pack(">HH", side, side) + photograph[place + 9 :]


def with_segment(photograph: bytes, content: bytes, marker: int = 0xE1) -> bytes:
    """Insert a segment at the front, by default APP1."""
    return photograph[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + photograph[2:]


def oddities(photograph: bytes) -> dict[str, tuple[bytes, str]]:
    """Return name -> (file, expected result): "same", "repaired: KIND" or "quarantined: REASON"."""
    image = Image.open(io.BytesIO(photograph)).convert("RGB")
    small = image.resize((48, 32))
    deep = (np.asarray(small.convert("L")).astype(np.uint16) << 8) + 7
    clear = small.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    return {
        "sound": (photograph, "same"),
        "progressive": (encode_image(small, "JPEG", progressive=True), "same"),
        "grey": (encode_image(small.convert("L"), "JPEG"), "same"),
        "png": (encode_image(small, "PNG"), "repaired: png"),
        "gif": (encode_image(small, "GIF"), "repaired: gif"),
        "webp": (encode_image(small, "WEBP"), "repaired: webp"),
        "tiff": (encode_image(small, "TIFF"), "repaired: tiff"),
        "bmp": (encode_image(small, "BMP"), "repaired: bmp"),
        "deep": (encode_image(Image.fromarray(deep), "PNG"), "repaired: 16_bit"),
        "clear": (encode_image(clear, "PNG"), "repaired: alpha"),
        "cmyk": (encode_image(small.convert("CMYK"), "JPEG"), "repaired: cmyk"),
        "broken_exif": (with_segment(photograph, b"Exif\0\0MM\0*\xff\xff\xff\xff"), "repaired: broken_exif"),
        "truncated": (photograph[: len(photograph) // 2], "quarantined: truncated"),
        "cut_png": (encode_image(small, "PNG")[:-900], "quarantined: undecodable"),
        "ended_early": (photograph[: len(photograph) // 2] + b"\xff\xd9", "quarantined: undecodable"),
        "empty": (b"", "quarantined: empty"),
        "page": (b"\n<html><body>Not found</body></html>", "quarantined: not_an_image"),
        "huge": (huge_header(photograph), "quarantined: too_large"),
        "noise": (bytes(range(256)) * 9, "quarantined: not_an_image"),
    }
