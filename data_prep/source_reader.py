"""Read the bytes of one planned image from its file or archive.

Invariant: exactly the planned bytes are returned. A source that changes or fails during the build raises
UserError; a problem of one image alone raises ImageError. A read takes at most IMAGE_BYTES_LIMIT of memory.
"""

import os
import zlib
from collections import OrderedDict

from data_prep.errors import UserError
from data_prep.pixels import ImageError
from data_prep.sources.containers import open_gzip
from data_prep.sources.sample import Location, Storage

IMAGE_BYTES_LIMIT = 512 << 20
_MAX_OPEN_FILES = 256


class SourceReader:
    """Keep archives open between reads; one per process."""

    def __init__(self, root: str):
        self._root = root
        self._prefix = os.path.join(root, "")
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, location: Location) -> bytes:
        """Read one image.

        Raises:
            UserError: If the source cannot be read or has changed since it was planned.
            ImageError: If the file is too large or cannot be decompressed.
        """
        if location.size > IMAGE_BYTES_LIMIT:
            raise ImageError("too_large", f"a file of {location.size:,} bytes")
        try:
            data = self._read(location)
        except OSError as error:
            raise UserError(f"{location}: cannot be read from {self._root}: {error.strerror or error}") from error
        if len(data) != location.size:
            raise UserError(f"{location}: has changed in {self._root} since the build was planned; restore it")
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
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, IMAGE_BYTES_LIMIT)
    except zlib.error as error:
        raise ImageError("damaged_member", f"the archive's member does not inflate ({error})") from error
    if not stream.eof:
        reason = "too_large" if stream.unconsumed_tail else "damaged_member"
        raise ImageError(reason, "the archive's member does not inflate to its end")
    return inflated
