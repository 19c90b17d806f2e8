"""Read a file front to back in large blocks, with small steps back and skips.

Invariant: with a digest, every byte from the start to `finish` goes through it once and in order, so a file's checksum
and its content come from one pass. A failed read raises UnreadableSource, which is no error of an archive's format.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_KEPT_BYTES = 2 << 20  # before the last read, since the end of a tar is found by looking ahead


class UnreadableSource(Exception):
    """A file whose bytes cannot be read, for whatever they contain."""


class SequentialReader(io.RawIOBase):
    """A seekable file over `fetch`.

    Args:
        fetch: Returns the bytes at (offset, size), fewer at the end of the file.
        block: Bytes to fetch at a time.
        digest: A hash of hashlib to update with the whole file. Without it, the bytes that nobody reads are skipped.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], block: int, digest=None):
        self._fetch, self._block, self._digest = fetch, block, digest
        self._buffer, self._start, self._position = b"", 0, 0

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        assert count >= 0
        data = self.read_at(self._position, count)
        self._position += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes at `offset`, fewer at the end of the file. Raises UnreadableSource if that fails."""
        end = self._start + len(self._buffer)
        if offset < self._start or (self._digest is None and offset > end):
            assert self._digest is None
            self._buffer, self._start = b"", offset
            end = offset
        while end < offset + size:
            is_skipping = self._digest is not None and end < offset
            wanted = self._block if is_skipping else max(self._block, offset + size - end)
            data = self._fetch_block(end, wanted)
            if not data:
                break
            kept = max(0, min(offset, end) - _KEPT_BYTES - self._start)
            self._buffer = self._buffer[kept:] + data
            self._start += kept
            end += len(data)
        return self._buffer[offset - self._start : offset - self._start + size]

    def finish(self) -> int:
        """Read to the end of the file; returns its size in bytes."""
        end = self._start + len(self._buffer)
        self._buffer = b""
        while data := self._fetch_block(end, self._block):
            end += len(data)
        self._start = end
        return end

    def _fetch_block(self, offset: int, size: int) -> bytes:
        try:
            data = self._fetch(offset, size)
        except OSError as error:
            raise UnreadableSource(error.strerror or str(error)) from error
        if self._digest is not None:
            self._digest.update(data)
        return data


@contextlib.contextmanager
def open_local(path: Path, block: int, digest=None) -> Iterator[tuple[SequentialReader, int]]:
    """Open a local file; yields the reader and the size in bytes. Raises UnreadableSource if that fails."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UnreadableSource(error.strerror) from error
    with file:

        def fetch(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        yield SequentialReader(fetch, block, digest), os.fstat(file.fileno()).st_size
