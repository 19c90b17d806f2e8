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
SCAN_LIMIT = 200
"""A progressive image needs about ten scans; thousands of tiny ones are a denial of service."""

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _APP1, _APP14 = 0xD9, 0xDA, 0xE1, 0xEE
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
    broken_exif: tuple[tuple[int, int], ...]  # byte ranges of EXIF segments that cannot be parsed


def parse_jpeg(data: bytes) -> JpegInfo:
    """Follow the markers of a JPEG file to its end.

    Raises:
        ImageError: With reason `truncated` if the data end before EOI, `too_many_scans`, or `damaged`.
    """
    if data[:2] != b"\xff\xd8":
        raise ImageError("damaged", "no SOI marker")
    position, end, scans = 2, len(data), 0
    frame: tuple[int, int, int, int, int] | None = None
    transform = None
    orientation, broken = 1, []
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
        elif code == _APP1 and data[start : start + 6] == b"Exif\0\0":
            try:
                orientation = exif_orientation(data[start + 6 : stop])
            except ValueError:
                broken.append((position, stop))
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
    return JpegInfo(width, height, components, precision, process, transform, orientation, tuple(broken))


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
                    raise ValueError(f"orientation {value}")
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
