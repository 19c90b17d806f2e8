"""Files below a URL that fsspec opens (s3, gs, http, ...), read by ranges.

Invariant: a read returns the bytes of the range, fewer only at the end of the file, or raises UnreadableSource. Safe to
use in forked workers if each opens its own.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from data_prep.errors import UserError
from data_prep.sources.sequential_reader import UnreadableSource

logger = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY_DELAYS_S = (1.0, 4.0, 16.0)


def is_url(path: str) -> bool:
    return "://" in path


def hide_password(url: str) -> str:
    """Return a URL without user and password, for messages."""
    return re.sub(r"//[^/@]*@", "//", url)


class RemoteFiles:
    """The files below `root`. Raises UserError if the URL cannot be opened, or the library for it is missing."""

    def __init__(self, root: str):
        import fsspec  # slow to import, and not needed for local files

        self.root = hide_password(root)
        try:
            self._file_system, self._path = fsspec.core.url_to_fs(root.rstrip("/"))
        except Exception as error:  # some file systems connect here, each with its own exceptions
            raise UserError(
                f"SRC {self.root}: cannot be opened: {_describe(error)}; check the URL, the credentials, and that "
                "fsspec's package for it is installed"
            ) from error

    def list_names(self) -> list[str]:
        """Return the names of the files and folders directly below the root."""
        paths = self._try(lambda: self._file_system.ls(self._path, detail=False))
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def size(self, name: str) -> int | None:
        """Return a file's bytes, None if the server does not tell."""
        return self._try(lambda: self._file_system.size(f"{self._path}/{name}"))

    def read(self, name: str, offset: int, size: int) -> bytes:
        data = self._try(lambda: self._file_system.cat_file(f"{self._path}/{name}", start=offset, end=offset + size))
        if len(data) > size:
            raise UnreadableSource(f"{len(data):,} instead of {size:,} bytes; the server must support range requests")
        return data

    def _try(self, request: Callable[[], T]) -> T:
        for delay in _RETRY_DELAYS_S:
            try:
                return request()
            except Exception as error:  # each file system of fsspec has its own exceptions
                if _is_permanent(error):
                    raise UnreadableSource(_describe(error)) from error
                logger.warning(f"{self.root}: {_describe(error)}; trying again in {delay:g} s")
                time.sleep(delay)
        try:
            return request()
        except Exception as error:
            raise UnreadableSource(_describe(error)) from error


def _is_permanent(error: Exception) -> bool:
    # For http, fsspec raises FileNotFoundError for any status.
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    return status in (401, 403, 404) if status else isinstance(error, FileNotFoundError | PermissionError)


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
