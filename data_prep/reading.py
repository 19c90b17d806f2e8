"""Reads the bytes of one planned image from wherever it lies.

Invariant: exactly the planned bytes come back, or UserError says which source can't be read: a build must not
go on over a source that is changing or failing under it.
"""

import os
from collections import OrderedDict

from data_prep.errors import UserError
from data_prep.sources.sample import Location, Storage

_OPEN_FILES = 256


class Reader:
    """Keeps archives open between reads; one per process."""

    def __init__(self, root: str):
        self._root = root
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, location: Location) -> bytes:
        """Raises UserError."""
        try:
            if location.storage == Storage.FILE:
                with open(os.path.join(self._root, location.container), "rb", buffering=0) as file:
                    data = file.read(location.size + 1)
            else:
                data = self._pread(location)
        except OSError as error:
            raise UserError(f"{location} can't be read from {self._root}: {error.strerror}") from None
        if len(data) != location.size:
            raise UserError(
                f"{location} in {self._root} has changed since the build was planned: it no longer has "
                f"{location.size:,} bytes"
            )
        return data

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _pread(self, location: Location) -> bytes:
        raise NotImplementedError(location.storage)
