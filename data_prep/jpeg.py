"""Parse the structure of a JPEG file without decoding it.

Invariant: `parse_jpeg` follows the markers from SOI to EOI by their lengths and never guesses; what a decoder
could not follow raises ImageError. The time is linear in the file's length, nearly all of it inside numpy.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np

from data_prep.pixels import ImageError

BASELINE_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
GPU_SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2))
"""Luma samples per chroma sample (horizontally, vertically) that nvJPEG documents: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1
and 4:1:0. It rejects others: https://docs.nvidia.com/cuda/nvjpeg"""
SCAN_LIMIT = 200
"""A progressive image needs about ten scans; thousands of tiny ones are a denial of service."""

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _APP1, _APP2, _APP14 = 0xD9, 0xDA, 0xE1, 0xE2, 0xEE
_ICC = b"ICC_PROFILE\0"
# In entropy-coded data 0xFF is followed by 0 (a stuffed byte), a restart marker or fill bytes; any other byte
# makes it a marker.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_WINDOW = 1 << 16  # bytes; numpy's intermediate arrays stay in the CPU cache


@dataclass(frozen=True, slots=True)
class JpegInfo:
    """Header of a JPEG; width and height in pixels as stored, before any EXIF rotation."""

    width: int
    height: int
    components: int
    precision: int  # bits
    process: int  # code of the SOF marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive; others are rare
    adobe_transform: int | None  # of the Adobe segment; 0: three components are RGB
    orientation: int  # EXIF's, 1 to 8; 1 without EXIF
    sampling: tuple[tuple[int, int], ...]  # horizontal and vertical factor of each component, 1 to 4
    broken_exif: tuple[tuple[int, int], ...]  # byte ranges of EXIF segments that cannot be parsed
    broken_icc: tuple[tuple[int, int], ...]  # byte ranges of all ICC segments if they make no complete profile

    @property
    def fits_gpu_decoder(self) -> bool:
        """Return whether nvJPEG decodes the chroma sampling, whose factors must be the same for Cb and Cr."""
        (h, v), *chroma = self.sampling
        if not chroma:
            return True
        ratios = {(h / chroma_h, v / chroma_v) for chroma_h, chroma_v in chroma}
        return len(ratios) == 1 and ratios.pop() in GPU_SAMPLINGS


def parse_jpeg(data: bytes) -> JpegInfo:
    """Follow the markers of a JPEG file to its end.

    Raises:
        ImageError: With reason `truncated` if the data end before EOI, `too_many_scans`, or `damaged`.
    """
    if data[:2] != b"\xff\xd8":
        raise ImageError("damaged", "no SOI marker")
    position, end, scans = 2, len(data), 0
    frame: tuple[int, int, int, int, int] | None = None
    sampling: tuple[tuple[int, int], ...] = ()
    transform = None
    orientation, broken_exif = 1, []
    icc: dict[tuple[int, int], bytes] = {}
    while True:
        while position + 1 < end and data[position] == 0xFF and data[position + 1] == 0xFF:
            position += 1  # fill bytes
        if position + 2 > end:
            raise _truncated(end)
        if data[position] != 0xFF:
            raise ImageError("damaged", f"no marker at byte {position:,}")
        code = data[position + 1]
        if code == _EOI:
            break
        if code in (0x00, 0x01, 0xD8) or 0xD0 <= code <= 0xD7:
            raise ImageError("damaged", f"marker 0xFF{code:02X} at byte {position:,} where none may stand")
        if position + 4 > end:
            raise _truncated(end)
        length = data[position + 2] << 8 | data[position + 3]
        start, stop = position + 4, position + 2 + length
        if length < 2:
            raise ImageError("damaged", f"segment of length {length} at byte {position:,}")
        if stop > end:
            raise ImageError("truncated", f"ends inside of a segment at byte {position:,}")
        if code in _SOF:
            if frame is not None or stop - start < 6:
                raise ImageError("damaged", f"frame header at byte {position:,} is damaged or a second one")
            frame = (code, *struct.unpack_from(">BHHB", data, start))
            sampling = _sampling_factors(data[start + 6 : stop], frame[-1])
        elif code == _APP1 and data[start : start + 6] == b"Exif\0\0":
            try:
                orientation = exif_orientation(data[start + 6 : stop])
            except ValueError:
                broken_exif.append((position, stop))
        elif code == _APP2 and data[start : start + len(_ICC)] == _ICC and stop - start >= len(_ICC) + 2:
            icc[position, stop] = data[start + len(_ICC) : min(start + len(_ICC) + 3, stop)]
        elif code == _APP14 and data[start : start + 5] == b"Adobe" and stop - start >= 12:
            transform = data[start + 11]
        position = stop
        if code == _SOS:
            scans += 1
            if frame is None:
                raise ImageError("damaged", "scan before the frame header")
            if scans > SCAN_LIMIT:
                raise ImageError("too_many_scans", f"more than {SCAN_LIMIT} scans")
            position = _find_end_of_scan(data, position)
    if not scans or frame is None:
        raise ImageError("damaged", "no image data")
    process, precision, height, width, components = frame
    if not (width and height and components):
        raise ImageError("damaged", f"{width} x {height} px with {components} components")
    broken_icc = () if _is_complete(list(icc.values())) else tuple(icc)
    coding = (components, precision, process, transform)
    return JpegInfo(width, height, *coding, orientation, sampling, tuple(broken_exif), broken_icc)


def _sampling_factors(components: bytes, count: int) -> tuple[tuple[int, int], ...]:
    """Parse the components of a frame header, three bytes each."""
    factors = tuple((byte >> 4, byte & 15) for byte in components[1 : 3 * count : 3])
    if len(factors) < count or not all(1 <= factor <= 4 for pair in factors for factor in pair):
        raise ImageError("damaged", "the frame header has wrong sampling factors")
    return factors


def _is_complete(parts: list[bytes]) -> bool:
    """Return whether ICC segments are a whole profile, or none at all; libjpeg-turbo gives a warning otherwise.

    Args:
        parts: Of each segment its number, the number of segments, and the first byte of the profile if it has one.
    """
    if not parts:
        return True
    expected = [(number, len(parts)) for number in range(1, len(parts) + 1)]
    return sorted(tuple(part[:2]) for part in parts) == expected and any(len(part) == 3 for part in parts)


def _truncated(end: int) -> ImageError:
    return ImageError("truncated", f"ends at byte {end:,} before the end-of-image marker")


def _find_end_of_scan(data: bytes, position: int) -> int:
    """Return the position of the first marker after entropy-coded data.

    numpy skips stuffed bytes; the regular expression, three times slower, skips what else is no marker.
    """
    codes = np.frombuffer(data, np.uint8)
    while position + 1 < len(data):
        window = codes[position : position + _WINDOW + 1]
        unstuffed = np.minimum((window[:-1] == 0xFF).view(np.uint8), window[1:]).view(bool)
        first = int(unstuffed.argmax())
        if unstuffed[first]:
            marker = _MARKER_AFTER_SCAN.search(data, position + first)
            if marker is None:
                break
            return marker.start()
        position += _WINDOW
    raise _truncated(len(data))


def exif_orientation(tiff: bytes) -> int:
    """Return the orientation in an EXIF block (without its "Exif" signature), 1 if it has none.

    Raises:
        ValueError: If the block is no TIFF structure, its first directory lies outside the block, or the
            orientation is none of 1 to 8. The orientation is then unknown.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no TIFF header")
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        if offset < 8 or offset + 2 + 12 * count > len(tiff):
            raise ValueError("directory outside of the block")
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                if kind not in (3, 4) or number != 1 or not 1 <= value <= 8:
                    raise ValueError(f"invalid orientation tag: value {value}, type {kind}, count {number}")
                return value
    except struct.error as error:
        raise ValueError(str(error)) from error
    return 1


def remove_ranges(data: bytes, ranges: tuple[tuple[int, int], ...]) -> bytes:
    """Return `data` without the byte `ranges`, which are ascending and do not overlap."""
    parts, position = [], 0
    for start, stop in ranges:
        parts.append(data[position:start])
        position = stop
    return b"".join([*parts, data[position:]])
