"""Prepare one image for a shard: detect its format, check it, pass it through, repair or reject it.

Invariant: `prepare` is a pure function of (bytes, policy, rotation); file names are not used. It returns a
baseline or progressive 8-bit JPEG, RGB (as YCbCr) or gray, that libjpeg-turbo decodes without a warning (4:1:0:
without an error; with check="structure": whose markers are complete). A valid JPEG is returned byte for byte, and
pixels are encoded at most once.
"""

from dataclasses import dataclass, replace

import numpy as np

from data_prep import jpeg, pixels
from data_prep.pixels import ImageError

REENCODE_QUALITY = 95
METADATA_REPAIRS = ("broken_exif", "broken_icc")
"""Repairs without which decoders return the same pixels."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How images are checked and converted."""

    check: str = "decode"  # "decode" the whole image, or only follow a JPEG's "structure" to its end
    orientation: str = "apply"  # "apply" turns pixels according to EXIF, "ignore" keeps them as stored
    resize: int | None = None  # shorter side in pixels after shrinking
    quality: int | None = None  # 1 to 100: re-encode every image; None: only if necessary, with REENCODE_QUALITY
    max_pixels: int = 100_000_000  # larger images raise ImageError without being decoded


@dataclass(frozen=True, slots=True)
class Prepared:
    """A JPEG that is ready for a shard."""

    data: bytes
    width: int
    height: int
    gray: bool
    repairs: tuple[str, ...]  # why the bytes differ from the source's; resizing is not a repair


def prepare(data: bytes, policy: Policy, rotation: int = 0) -> Prepared:
    """Check an image and convert it if necessary.

    Args:
        data: The file.
        policy: How to check and convert it.
        rotation: Degrees counter-clockwise, a multiple of 90, by which the source wants the pixels turned.

    Raises:
        ImageError: If the image cannot be used; its reason is a code for the quarantine.
    """
    kind = detect_format(data)
    if kind != "jpeg":
        return _convert(data, policy, rotation, [kind])
    info = jpeg.parse_jpeg(data)
    if info.width * info.height > policy.max_pixels:
        raise pixels.too_large_error(info.width, info.height, policy.max_pixels)
    problem = _compatibility_problem(info)
    if problem:
        return _convert(data, policy, rotation, [problem])

    repairs = [name for name in ("broken_exif", "broken_icc") if getattr(info, name)]
    if repairs:
        data = jpeg.remove_ranges(data, tuple(sorted(info.broken_exif + info.broken_icc)))
    orientation = info.orientation if policy.orientation == "apply" else 1
    if orientation != 1:
        repairs.append("exif_orientation")
    if rotation % 360:
        repairs.append("rotation")
    gray = info.components == 1
    if orientation == 1 and rotation % 360 == 0 and policy.resize is None and policy.quality is None:
        if policy.check == "decode":
            # Decoding to gray reads all coded bits of all components but transforms luma only, in 3/4 of the time.
            pixels.decode_jpeg(data, info.width, info.height, gray=True)
        return Prepared(data, info.width, info.height, gray, tuple(repairs))
    array = pixels.decode_jpeg(data, info.width, info.height, gray, policy.resize)
    array = pixels.rotate(pixels.apply_orientation(array, orientation), rotation)
    return _encode(array, policy, repairs)


def check_in_place(data: bytes, policy: Policy) -> Prepared:
    """Check an image that must keep its bytes.

    Raises:
        ImageError: If it cannot be used, with reason `needs_reencoding` if only `prepare` makes it usable.
    """
    prepared = prepare(data, policy)
    repairs = [name for name in prepared.repairs if name not in METADATA_REPAIRS]
    if repairs:
        raise ImageError("needs_reencoding", ", ".join(repairs))
    return replace(prepared, data=data, repairs=())


def detect_format(data: bytes) -> str:
    """Return the image format by content. Raises ImageError if it is none that can be decoded."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data[:2] == b"BM" and len(data) > 26:
        return "bmp"
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"avif", b"avis"):
            return "avif"
        if data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
            if not pixels.HEIF:
                raise ImageError("no_decoder", "a HEIC image; `pip install pillow-heif` to read it")
            return "heic"
    if not data:
        raise ImageError("empty", "0 bytes")
    if data[:64].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ImageError("not_an_image", "a web page or XML")
    raise ImageError("not_an_image", f"begins with {data[:8].hex(' ')}")


def is_image(data: bytes) -> bool:
    """Return whether a file's first 64 bytes are those of an image format, with or without a decoder for it."""
    try:
        detect_format(data)
    except ImageError as error:
        return error.reason == "no_decoder"
    return True


def _compatibility_problem(info: jpeg.JpegInfo) -> str | None:
    """Return the kind of repair if decoders disagree about such JPEGs."""
    if info.components == 4:
        return "cmyk"
    if info.process not in jpeg.BASELINE_OR_PROGRESSIVE or info.precision != 8:
        return "uncommon_jpeg"
    if info.components not in (1, 3):
        raise ImageError("undecodable", f"a JPEG with {info.components} components")
    if info.components == 3 and info.adobe_transform == 0:
        return "rgb_jpeg"
    if not info.fits_gpu_decoder:
        return "chroma_sampling"
    return None


def _convert(data: bytes, policy: Policy, rotation: int, repairs: list[str]) -> Prepared:
    array, converted, orientation = pixels.decode_other(data, policy.max_pixels)
    repairs += [name for name in converted if name not in repairs]
    if policy.orientation == "apply" and orientation != 1:
        array = pixels.apply_orientation(array, orientation)
        repairs.append("exif_orientation")
    if rotation % 360:
        array = pixels.rotate(array, rotation)
        repairs.append("rotation")
    if max(array.shape[:2]) > 65_500:
        raise ImageError("too_large", f"{array.shape[1]} x {array.shape[0]} px do not fit into a JPEG")
    return _encode(array, policy, repairs)


def _encode(array: np.ndarray, policy: Policy, repairs: list[str]) -> Prepared:
    if policy.resize is not None:
        array = pixels.shrink(array, policy.resize)
    height, width, channels = array.shape
    # Repairs keep the full color resolution; resized images are meant to be small and fast to decode.
    chroma = "444" if policy.resize is None and policy.quality is None else "420"
    data = pixels.encode_jpeg(array, policy.quality or REENCODE_QUALITY, chroma)
    return Prepared(data, width, height, channels == 1, tuple(repairs))
