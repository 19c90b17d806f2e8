"""Storage backends of shard sets: a local directory, or a URL that fsspec opens (http, s3, gs, ...).

Invariant: a read returns exactly the requested bytes or raises: FileNotFoundError, PermissionError or UserError
if a retry is useless, OSError otherwise. Storages are thread-safe. Reads call `heartbeat()` at every sign of
progress. `read` returns spans of a file, `read_file` a small file such as a manifest or an index. `max_gap` is
the number of bytes between two spans that are cheaper to read than to skip.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.data.retry import Heartbeat
from pipeline.errors import UserError

Span = tuple[int, int]
"""Offset and size in bytes."""

MAX_OPEN_FILES = 64
MAX_READ_BYTES = 8 << 20


def open_storage(path: str) -> "LocalStorage | UrlStorage":
    """Open a directory or URL. Raise UserError if it is invalid or the library for its protocol is missing."""
    if "://" not in path or path.startswith("file://"):
        return LocalStorage(Path(path.removeprefix("file://")))
    return UrlStorage(path)


class LocalStorage:
    """A directory. Files stay open, so a file that is deleted or replaced can be read to its end."""

    max_gap = 16 << 10

    def __init__(self, directory: Path, max_open_files: int = MAX_OPEN_FILES):
        self.directory, self.path, self._max_open_files = directory, str(directory), max_open_files
        self._open_files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, spans: Sequence[Span], heartbeat: Heartbeat) -> list[bytes]:
        file = self._open(name)
        parts = []
        try:
            for offset, size in spans:
                parts.append(os.pread(file.descriptor, size, offset))
                heartbeat()
        except OSError:
            self.forget(name)  # a stale NFS handle: the retry opens the file again
            raise
        if any(len(part) != size for part, (_, size) in zip(parts, spans, strict=True)):
            raise UserError(
                f"{self.directory / name}: ends at byte {os.fstat(file.descriptor).st_size:,}, before its "
                "last sample (truncated); restore it, or rebuild the shard set"
            )
        return parts

    def read_file(self, name: str, heartbeat: Heartbeat) -> bytes:
        return (self.directory / name).read_bytes()

    def is_open(self, name: str) -> bool:
        return name in self._open_files

    def forget(self, name: str) -> None:
        """Drop the open file, so that the next read opens it again."""
        with self._lock:
            self._open_files.pop(name, None)

    def _open(self, name: str) -> "_OpenFile":
        with self._lock:
            file = self._open_files.get(name)
            if file is not None:
                self._open_files.move_to_end(name)
                return file
        file = _OpenFile(self.directory / name)
        with self._lock:
            self._open_files[name] = file
            while len(self._open_files) > self._max_open_files:
                self._open_files.popitem(last=False)
        return file


class _OpenFile:
    """A file descriptor, closed once no thread refers to it, hence never during a read."""

    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)


class UrlStorage:
    """A URL, read with range requests through fsspec."""

    max_gap = 256 << 10

    def __init__(self, url: str):
        import fsspec  # slow to import, and not needed for local shard sets

        without_query = re.sub(r"(?<![:/])/+$", "", url.partition("?")[0])
        self.path = re.sub(r"//[^/@]*@", "//", without_query)  # without a password
        if "?" in url:
            raise UserError(f"{self.path}: a shard set's URL cannot have a query (?...); remove it")
        try:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") and not (parts.hostname and parts.port != 0):
                raise ValueError("no server in the URL")
            self._file_system, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except Exception as error:  # some file systems connect here, each with its own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.path}: cannot be opened: {reason}; check the URL, the credentials, and that fsspec's package "
                "for it is installed"
            ) from error

    def read(self, name: str, spans: Sequence[Span], heartbeat: Heartbeat) -> list[bytes]:
        parts = []
        for offset, size in spans:
            part = self._cat(name, start=offset, end=offset + size)
            if len(part) > size:
                raise UserError(
                    f"{self.path}: returned {len(part):,} instead of {size:,} bytes of {name}; use a server "
                    "that supports range requests"
                )
            if len(part) < size:
                raise OSError(f"received {len(part):,} of {size:,} bytes")
            parts.append(part)
            heartbeat()
        return parts

    def read_file(self, name: str, heartbeat: Heartbeat) -> bytes:
        return self._cat(name)

    def _cat(self, name: str, **span: int) -> bytes:
        try:
            return self._file_system.cat_file(f"{self._root}/{name}", **span)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system of fsspec has its own exceptions
            status = getattr(error, "status", None)
            if status in (401, 403):
                raise PermissionError(f"HTTP status {status}") from error
            raise OSError(f"{type(error).__name__}: {error}") from error


def coalesce_spans(starts: Sequence[int], ends: Sequence[int], max_gap: int) -> tuple[list[Span], list[int]]:
    """Merge byte ranges [start, end) into fewer reads.

    A range joins the previous span if at most `max_gap` bytes separate them and the span stays within
    `MAX_READ_BYTES`.

    Returns:
        The spans (offset, size), and for each range the index of its span.
    """
    spans: list[list[int]] = []
    span_of_range = []
    for start, end in zip(starts, ends, strict=True):
        if spans and spans[-1][0] <= start <= spans[-1][1] + max_gap and end - spans[-1][0] <= MAX_READ_BYTES:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
        span_of_range.append(len(spans) - 1)
    return [(start, end - start) for start, end in spans], span_of_range
