"""Read the bytes of one planned image from its file or archive.

Invariant: exactly the planned bytes are returned. A source that changes or fails during the build raises
UserError; a problem of one image alone raises ImageError. A read takes at most IMAGE_BYTES_LIMIT of memory.
"""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.pixels import ImageError
from data_prep.sources.containers import open_gzip
from data_prep.sources.remote_files import RemoteFiles, hide_password, is_url
from data_prep.sources.sample import Location, Storage
from data_prep.sources.sequential_reader import UnreadableSource

IMAGE_BYTES_LIMIT = 512 << 20
_MAX_OPEN_FILES = 256


class SourceReader:
    """Keep archives open between reads; one per process.

    Args:
        root: The source's root, a path or URL.
        staged: Folder of the images of parquet files, if there are any.
    """

    def __init__(self, root: str, staged: Path | None = None):
        self._root, self._staged = root, staged
        self._remote = RemoteFiles(root) if is_url(root) else None
        self._staged_ends: dict[str, np.ndarray] = {}
        self._prefix = os.path.join(root, "")
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, location: Location) -> bytes:
        """Read one image.

        Raises:
            UserError: If the source cannot be read or has changed since it was planned.
            ImageError: If the file is too large or cannot be decompressed.
        """
        check_image_size_limit(location.size)
        try:
            data = self._read(location)
        except (OSError, UnreadableSource) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{location}: cannot be read from {hide_password(self._root)}: {reason}") from error
        if location.storage == Storage.PARQUET:
            return data
        if len(data) != location.size:
            root = hide_password(self._root)
            raise UserError(f"{location}: has changed in {root} since the build was planned; restore it")
        return _inflate(data) if location.storage == Storage.DEFLATED else data

    def _read(self, location: Location) -> bytes:
        if self._remote is not None:
            return self._remote.read(location.container, location.offset, location.size)
        if location.storage == Storage.PARQUET:
            return self._read_staged(location.container, location.offset)
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

    def _read_staged(self, name: str, row: int) -> bytes:
        assert self._staged is not None
        if name not in self._staged_ends:
            self._staged_ends[name] = np.load(self._staged / f"{name}.npy", mmap_mode="r")
        ends = self._staged_ends[name]
        start = int(ends[row - 1]) if row else 0
        check_image_size_limit(int(ends[row]) - start)
        return os.pread(self._descriptor(str(self._staged / f"{name}.images")), int(ends[row]) - start, start)

    def _descriptor(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def check_image_size_limit(size: int) -> None:
    """Raise ImageError if a file is too large to be read into memory."""
    if size > IMAGE_BYTES_LIMIT:
        raise ImageError("too_large", f"a file of {size:,} bytes")


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
