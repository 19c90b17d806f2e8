"""Many short strings in one buffer, for tables of millions of rows.

Invariant: strings come back as they were appended, including the surrogates of names that are not UTF-8.
"""

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


class StringColumn:
    """Strings by row number."""

    def __init__(self):
        self._bytes = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __getitem__(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._bytes[start : self._ends[row]].decode("utf-8", "surrogateescape")

    def update_digest(self, digest) -> None:
        digest.update(self._bytes)
        digest.update(self._ends)


def has_repeated(texts: Iterable[str]) -> bool:
    """Return whether a text occurs twice. Keeps 8 bytes of each."""
    hashes = array("Q")
    for text in texts:
        hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return len(np.unique(np.asarray(hashes))) < len(hashes)
