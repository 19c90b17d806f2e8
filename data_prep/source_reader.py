"""Reads the bytes of one planned image from wherever it lies.

Invariant: exactly the planned bytes come back, or UserError says which source can't be read: a build must not
go on over a source that is changing or failing under it. What is wrong with one image alone is an ImageError.
No read takes more memory than IMAGE_BYTES_LIMIT.
"""

import os
import zlib
from collections import OrderedDict

from data_prep.errors import UserError
from data_prep.pixels import ImageError
from data_prep.sources.containers import open_gzip
from data_prep.sources.sample import Location, Storage

IMAGE_BYTES_LIMIT = 512 << 20
_OPEN_FILES = 256


class Reader:
    """Keeps archives open between reads; one per process."""

    def __init__(self, root: str):
        self._root = root
        self._prefix = os.path.join(root, "")
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, location: Location) -> bytes:
        """Raises UserError, and ImageError for what is too large or does not inflate."""
        if location.size > IMAGE_BYTES_LIMIT:
            raise ImageError("too_large", f"a file of {location.size:,} bytes")
        try:
            data = self._read(location)
        except OSError as error:
            raise UserError(
                f"{location} can't be read from {self._root}: {error.strerror or error}"
            ) from None
        if len(data) != location.size:
            raise UserError(
                f"{location} in {self._root} has changed since the build was planned: it no longer has "
                f"{location.size:,} bytes"
            )
        return _inflate(data) if location.storage == Storage.DEFLATED else data

    def _read(self, location: Location) -> bytes:
        path = self._prefix + location.container if location.container else self._root
        if location.storage is Storage.FILE:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                return os.read(descriptor, location.size + 1)
            finally:
                os.close(descriptor)
        if location.storage == Storage.GZIPPED:
            file = open_gzip(path)
            file.seek(location.offset)
            return file.read(location.size)
        return os.pread(self._descriptor(path), location.size, location.offset)

    def _descriptor(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, IMAGE_BYTES_LIMIT)
    except zlib.error as error:
        raise ImageError("damaged_member", f"the archive's member does not inflate ({error})") from None
    if not stream.eof:
        reason = "too_large" if stream.unconsumed_tail else "damaged_member"
        raise ImageError(reason, "the archive's member does not inflate to its end")
    return inflated
