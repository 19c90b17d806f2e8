"""Where a shard set lies: a directory of this machine, or a URL that fsspec opens (http, s3, gs, ...).

Invariant: a store gives exactly the bytes that were asked for, or raises: FileNotFoundError, PermissionError
or UserError where trying again is useless, OSError for everything else. Stores may be used by many threads at
once. Whoever reads calls `alive()` at every sign of progress.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError

Heartbeat = Callable[[], None]
Span = tuple[int, int]
"""Offset and size in bytes."""

OPEN_FILES = 64
LARGEST_READ = 8 << 20
"""Bytes that neighbours are read together, at most."""


class Storage(Protocol):
    place: str
    """The directory or URL, for messages."""
    gap: int
    """Bytes between two spans that are cheaper to read along than to ask twice."""

    def read(self, name: str, spans: Sequence[Span], heartbeat: Heartbeat) -> list[bytes]:
        """Parts of a file."""

    def read_file(self, name: str, heartbeat: Heartbeat) -> bytes:
        """A small file: a manifest or an index."""


def open_storage(place: str) -> Storage:
    """The store at a directory or a URL. UserError where the URL's kind is unknown or its library missing."""
    if "://" not in place:
        return LocalStorage(Path(place))
    return (
        LocalStorage(Path(place.removeprefix("file://")))
        if place.startswith("file://")
        else UrlStorage(place)
    )


def is_url(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


class LocalStorage:
    """A directory. Files stay open, so one that is deleted or replaced can be read to its end."""

    gap = 16 << 10

    def __init__(self, directory: Path, open_files: int = OPEN_FILES):
        self.directory, self.place, self._open_files = directory, str(directory), open_files
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, spans: Sequence[Span], heartbeat: Heartbeat) -> list[bytes]:
        file = self._file(name)
        parts = []
        try:
            for offset, size in spans:
                parts.append(os.pread(file.descriptor, size, offset))
                heartbeat()
        except OSError:
            self.forget(name)  # a stale NFS handle: the next try opens the file anew
            raise
        if any(len(part) != size for part, (_, size) in zip(parts, spans, strict=True)):
            raise UserError(
                f"{self.directory / name}: ends at byte {os.fstat(file.descriptor).st_size:,}, before its "
                "last sample: it was truncated; restore it, or build the shard set anew"
            )
        return parts

    def read_file(self, name: str, heartbeat: Heartbeat) -> bytes:
        return (self.directory / name).read_bytes()

    def is_open(self, name: str) -> bool:
        return name in self._open

    def forget(self, name: str) -> None:
        """Open the file anew next time."""
        with self._lock:
            self._open.pop(name, None)

    def _file(self, name: str) -> "_File":
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                return file
        file = _File(self.directory / name)
        with self._lock:
            self._open[name] = file
            while len(self._open) > self._open_files:
                self._open.popitem(last=False)
        return file


class _File:
    """An open file. It closes itself when nobody refers to it: never under a thread that is reading."""

    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)


class UrlStorage:
    """A URL that fsspec knows, read by ranges."""

    gap = 256 << 10

    def __init__(self, url: str):
        import fsspec  # heavy, and most runs never need it

        bare = re.sub(r"(?<![:/])/+$", "", url.partition("?")[0])
        self.place = re.sub(r"//[^/@]*@", "//", bare)  # without a password
        if "?" in url:
            raise UserError(f"{self.place}: a URL with a query (?...) cannot name a directory; leave it out")
        try:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") and not (parts.hostname and parts.port != 0):
                raise ValueError("it names no server")
            self._files, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except Exception as error:  # some file systems connect here, and each has its own kinds
            reason = " ".join(str(error).split())
            raise UserError(f"{self.place}: cannot be opened: {reason or type(error).__name__}") from None

    def read(self, name: str, spans: Sequence[Span], heartbeat: Heartbeat) -> list[bytes]:
        parts = []
        for offset, size in spans:
            part = self._get(name, start=offset, end=offset + size)
            if len(part) > size:
                raise UserError(
                    f"{self.place}: answers a request for {size:,} bytes of {name} with {len(part):,}; the "
                    "server must understand range requests"
                )
            if len(part) < size:
                raise OSError(f"{len(part):,} bytes came instead of {size:,}")
            parts.append(part)
            heartbeat()
        return parts

    def read_file(self, name: str, heartbeat: Heartbeat) -> bytes:
        return self._get(name)

    def _get(self, name: str, **part: int) -> bytes:
        try:
            return self._files.cat_file(f"{self._root}/{name}", **part)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # every file system behind fsspec has its own kinds
            if getattr(error, "status", None) in (401, 403):
                raise PermissionError(f"the server says {error.status}") from error
            raise OSError(f"{type(error).__name__}: {error}") from error


def coalesced(starts: Sequence[int], ends: Sequence[int], gap: int) -> tuple[list[Span], list[int]]:
    """Spans (offset, size) that hold the pieces [start, end), and for each piece the number of its span.

    A piece joins the span before it when at most `gap` bytes lie between and the span stays small enough.
    """
    spans: list[list[int]] = []
    rows = []
    for start, end in zip(starts, ends, strict=True):
        if spans and spans[-1][0] <= start <= spans[-1][1] + gap and end - spans[-1][0] <= LARGEST_READ:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
        rows.append(len(spans) - 1)
    return [(start, end - start) for start, end in spans], rows
