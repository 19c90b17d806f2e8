"""What happens to one image: sniffed, checked, passed through as it is or mended, or refused.

Invariant: `prepare` is a pure function of (bytes, policy, rotation). What it returns is a baseline or
progressive 8-bit JPEG, RGB (as YCbCr) or grey, that libjpeg-turbo decodes without a warning (under
check="structure": whose markers are whole); a sound JPEG comes back byte for byte; pixels are encoded at most
once. Whatever can't be decoded whole raises ImageError. The file's name is never looked at.
"""

from dataclasses import dataclass

from data_prep import jpeg, pixels
from data_prep.pixels import ImageError

REENCODE_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Policy:
    check: str = "decode"
    """decode: the whole image is decoded. structure: a JPEG's markers are followed to its end."""
    orientation: str = "apply"
    """apply: pixels are turned as EXIF says. ignore: they stay as stored."""
    resize: int | None = None
    """Shorter side in pixels after shrinking; None keeps the size."""
    quality: int | None = None
    """1 to 100: everything is re-encoded with it. None: only what must be, with REENCODE_QUALITY."""
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A JPEG that is fit for a shard. width, height in pixels; grey: one component."""

    data: bytes
    width: int
    height: int
    grey: bool
    repairs: tuple[str, ...]
    """Why the bytes are not the source's, in words that the manifest counts; resizing is none."""


def prepare(data: bytes, policy: Policy, rotation: int = 0) -> Prepared:
    """rotation: degrees counter-clockwise, a multiple of 90, by which the source says the pixels are to be
    turned.

    Raises ImageError with a reason code for the quarantine.
    """
    kind = sniff(data)
    if kind != "jpeg":
        return _convert(data, policy, rotation, [kind])
    try:
        header = jpeg.walk(data)
    except jpeg.JpegError as error:
        raise ImageError(error.reason, str(error)) from None
    if header.width * header.height > policy.max_pixels:
        raise pixels.too_large(header.width, header.height, policy.max_pixels)
    odd = _oddity(header)
    if odd:
        return _convert(data, policy, rotation, [odd])

    repairs = []
    if header.broken_exif:
        data = jpeg.without(data, header.broken_exif)
        repairs.append("broken_exif")
    orientation = header.orientation if policy.orientation == "apply" else 1
    if orientation != 1:
        repairs.append("exif_orientation")
    if rotation % 360:
        repairs.append("rotation")
    grey = header.components == 1
    if orientation == 1 and rotation % 360 == 0 and policy.resize is None and policy.quality is None:
        if policy.check == "decode":
            pixels.check_jpeg(data)
        return Prepared(data, header.width, header.height, grey, tuple(repairs))
    array = pixels.decode_jpeg(data, header.width, header.height, grey, policy.resize)
    array = pixels.rotate(pixels.orient(array, orientation), rotation)
    return _encode(array, policy, repairs)


def sniff(data: bytes) -> str:
    """The image format by content. Raises ImageError when there is none."""
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


def _oddity(header: jpeg.Jpeg) -> str | None:
    """Why a JPEG is none that every decoder reads alike, or None."""
    if header.components == 4:
        return "cmyk"
    if header.process not in jpeg.BASELINE_OR_PROGRESSIVE or header.precision != 8:
        return "uncommon_jpeg"
    if header.components not in (1, 3):
        raise ImageError("undecodable", f"a JPEG with {header.components} components")
    if header.coded_as_rgb:
        return "rgb_jpeg"
    return None


def _convert(data: bytes, policy: Policy, rotation: int, repairs: list[str]) -> Prepared:
    array, converted, orientation = pixels.decode_other(data, policy.max_pixels)
    repairs += [name for name in converted if name not in repairs]
    if policy.orientation == "apply" and orientation != 1:
        array = pixels.orient(array, orientation)
        repairs.append("exif_orientation")
    if rotation % 360:
        array = pixels.rotate(array, rotation)
        repairs.append("rotation")
    if max(array.shape[:2]) > 65_500:
        raise ImageError("too_large", f"{array.shape[1]} x {array.shape[0]} px do not fit into a JPEG")
    return _encode(array, policy, repairs)


def _encode(array, policy: Policy, repairs: list[str]) -> Prepared:
    if policy.resize is not None:
        array = pixels.shrink(array, policy.resize)
    height, width, channels = array.shape
    # What is only mended keeps all it had; what is shrunk is to be small and fast to decode.
    chroma = "444" if policy.resize is None and policy.quality is None else "420"
    data = pixels.encode_jpeg(array, policy.quality or REENCODE_QUALITY, chroma)
    return Prepared(data, width, height, channels == 1, tuple(repairs))
