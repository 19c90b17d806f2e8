"""A JPEG file's structure, without decoding it.

Invariant: `walk` follows the markers from SOI to EOI by their own lengths and never guesses; what it returns
is what the file says, and whatever a decoder could not follow is a JpegError. Its time is linear in the
file's length and nearly all of it inside numpy.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np

BASELINE_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
SCAN_LIMIT = 200
"""A progressive image needs about ten scans; thousands of tiny ones are an attack on the decoder's time."""

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _APP1, _APP14, _DNL = 0xD9, 0xDA, 0xE1, 0xEE, 0xDC
# In entropy-coded data 0xFF is followed by 0 (a stuffed byte), a restart marker or fill bytes; else it is a
# marker.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_WINDOW = 1 << 16  # bytes; what numpy makes of them stays in the processor's cache


class JpegError(ValueError):
    """The file can't be followed to its end. `reason` is a short code, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Jpeg:
    """width, height in pixels as stored (before any EXIF rotation); components 1, 3 or 4."""

    width: int
    height: int
    components: int
    precision: int
    process: int
    """The SOF marker's code: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, others hardly any decoder
    reads."""
    adobe_transform: int | None
    orientation: int
    """EXIF's, 1 to 8; 1 where there is none."""
    broken_exif: tuple[tuple[int, int], ...]
    """Byte ranges of EXIF segments that can't be parsed."""

    @property
    def coded_as_rgb(self) -> bool:
        return self.components == 3 and self.adobe_transform == 0


def walk(data: bytes) -> Jpeg:
    """Raises JpegError: reason `truncated` when the data end before EOI, `damaged` otherwise."""
    if data[:2] != b"\xff\xd8":
        raise JpegError("damaged", "no SOI marker")
    position, end, scans = 2, len(data), 0
    frame = transform = None
    orientation, broken = 1, []
    while True:
        while position + 1 < end and data[position] == 0xFF and data[position + 1] == 0xFF:
            position += 1  # fill bytes
        if position + 2 > end:
            raise JpegError("truncated", f"ends at byte {end:,} before the end-of-image marker")
        if data[position] != 0xFF:
            raise JpegError("damaged", f"no marker at byte {position:,}")
        code = data[position + 1]
        if code == _EOI:
            break
        if code in (0x00, 0x01, 0xD8) or 0xD0 <= code <= 0xD7:
            raise JpegError("damaged", f"marker 0xFF{code:02X} at byte {position:,} where none may stand")
        if position + 4 > end:
            raise JpegError("truncated", f"ends at byte {end:,} before the end-of-image marker")
        length = data[position + 2] << 8 | data[position + 3]
        start, stop = position + 4, position + 2 + length
        if length < 2:
            raise JpegError("damaged", f"segment of length {length} at byte {position:,}")
        if stop > end:
            raise JpegError("truncated", f"ends inside of a segment at byte {position:,}")
        if code in _SOF:
            if frame is not None or stop - start < 6:
                raise JpegError("damaged", f"frame header at byte {position:,} is damaged or a second one")
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
                raise JpegError("damaged", "scan before the frame header")
            if scans > SCAN_LIMIT:
                raise JpegError("too_many_scans", f"more than {SCAN_LIMIT} scans")
            position = _end_of_scan(data, position)
    if not scans:
        raise JpegError("damaged", "no image data")
    process, precision, height, width, components = frame
    if not (width and height and components):
        raise JpegError("damaged", f"{width} x {height} px with {components} components")
    return Jpeg(width, height, components, precision, process, transform, orientation, tuple(broken))


def _end_of_scan(data: bytes, position: int) -> int:
    """Where the first marker after entropy-coded data stands. numpy skips the stuffed bytes, the regular
    expression, three times slower, what else is no marker."""
    codes = np.frombuffer(data, np.uint8)
    while position + 1 < len(data):
        window = codes[position : position + _WINDOW + 1]
        unstuffed = np.minimum((window[:-1] == 0xFF).view(np.uint8), window[1:]).view(bool)
        first = int(unstuffed.argmax())
        if unstuffed[first]:
            found = _MARKER_AFTER_SCAN.search(data, position + first)
            if found is None:
                break
            return found.start()
        position += _WINDOW
    raise JpegError("truncated", f"ends at byte {len(data):,} before the end-of-image marker")


def exif_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block (after its "Exif" signature), 1 where it says none.

    Raises ValueError when the block is no TIFF structure, its first directory lies outside of it, or the
    orientation is none of 1 to 8: then nobody can know how the picture is meant.
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
        raise ValueError(str(error)) from None
    return 1


def without(data: bytes, ranges: tuple[tuple[int, int], ...]) -> bytes:
    """`data` without the byte `ranges` (ascending, not overlapping)."""
    kept, position = [], 0
    for start, stop in ranges:
        kept.append(data[position:start])
        position = stop
    return b"".join([*kept, data[position:]])
