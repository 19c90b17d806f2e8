"""Rows of a large CSV by one column's value, without keeping the file in memory.

Invariant: `rows(value)` returns every row with that value in the file's order, wherever in the file they
stand. Runs of rows with one value are one entry of 24 bytes: OpenImages' 60 million box rows need 40 MB.
"""

import csv
import hashlib
import os
from array import array
from pathlib import Path

import numpy as np

from data_prep.errors import UserError


class CsvRows:
    """Raises UserError when the file can't be read or has no such column."""

    def __init__(self, path: Path, column: str):
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            with open(path, "rb") as file:
                header = file.readline()
                self.columns = _fields(header)
                if column not in self.columns:
                    raise UserError(f"{path} has no column {column}")
                self._column = self.columns.index(column)
                self._index(file, len(header))
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None

    def rows(self, value: str) -> list[dict[str, str]]:
        wanted = _hash(value.encode())
        first, last = (
            np.searchsorted(self._hashes, wanted),
            np.searchsorted(self._hashes, wanted, side="right"),
        )
        found = []
        for place in self._order[first:last]:
            data = os.pread(self._file, int(self._sizes[place]), int(self._offsets[place]))
            for fields in csv.reader(data.decode("utf-8", "replace").splitlines(keepends=True)):
                if len(fields) > self._column and fields[self._column] == value:
                    found.append(dict(zip(self.columns, fields, strict=False)))
        return found

    def _index(self, file, position: int) -> None:
        hashes, offsets, sizes = array("Q"), array("Q"), array("Q")
        previous = None
        for line in file:
            while line.count(b'"') % 2:  # a quoted field goes on in the next line
                more = file.readline()
                if not more:
                    raise UserError(f"{self._path} ends inside of a quoted field: download it again")
                line += more
            value = line.split(b",", 1)[0] if self._column == 0 else _fields(line)[self._column].encode()
            if value == previous:
                sizes[-1] += len(line)
            else:
                previous = value
                hashes.append(_hash(value))
                offsets.append(position)
                sizes.append(len(line))
            position += len(line)
        order = np.argsort(np.asarray(hashes), kind="stable")
        self._hashes = np.asarray(hashes, np.uint64)[order]
        self._order = order.astype(np.uint32)
        self._offsets, self._sizes = np.asarray(offsets), np.asarray(sizes)


def _hash(value: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little"))


def _fields(line: bytes) -> list[str]:
    return next(csv.reader([line.decode("utf-8-sig", "replace").rstrip("\r\n")]), [])
