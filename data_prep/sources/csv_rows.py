"""Index of a large CSV file by one column, without keeping the file in memory.

Invariant: `rows(value)` returns every row with that value in the file's order; a row that cannot be read is counted.
A run of rows with one value is one entry of 24 bytes: OpenImages' 60 million box rows need 40 MB.

UTF-8, UTF-16 and Windows-1252 are read, with commas, semicolons or tabs as separators.
"""

import codecs
import csv
import hashlib
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.errors import UserError

ROW_LIMIT = csv.field_size_limit()
"""In bytes, 128 KiB. A longer row has a quote that is never closed, or is no CSV."""
_SEPARATORS = ",;\t"


class CsvRows:
    """The rows of a CSV file by the values of `column`.

    Attributes:
        path: The file.
        columns: Its header.
        skipped: Number of rows that are not in the index, by reason.
    """

    def __init__(self, path: Path, column: str):
        """Index the file. Raises UserError if it cannot be read, has no such column, or is no CSV file."""
        self.path, self.skipped = path, Counter()
        try:
            self._file = _open_as_utf8(path)
            header = self._file.readline(ROW_LIMIT)
            self._separator = _find_separator(header)
            self.columns = [name.strip() for name in next(_parse(header, self._separator), [])]
            if column not in self.columns:
                raise UserError(f"{path}: has no column {column}; download it again")
            self._column = self.columns.index(column)
            self._build_index(len(header))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
        if self.skipped.total() > len(self._hashes):
            raise UserError(f"{path}: most rows cannot be read ({self.describe_skipped()}); download it again")

    def rows(self, value: str) -> list[dict[str, str]]:
        """Return the rows with `value` in the column, by column names. A row that cannot be parsed is empty."""
        digest = np.uint64(hash_value(value.encode()))
        first = np.searchsorted(self._hashes, digest)
        last = np.searchsorted(self._hashes, digest, side="right")
        rows = []
        for run in self._order[first:last]:
            data = os.pread(self._file.fileno(), int(self._sizes[run]), int(self._offsets[run]))
            for fields in _parse(data, self._separator):
                if len(fields) < len(self.columns):
                    rows.append({})
                elif fields[self._column].strip() == value:
                    rows.append(dict(zip(self.columns, fields, strict=False)))
        return rows

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether rows have the values with these hashes, uint64 (n,) from `hash_value`: bool (n,)."""
        return np.isin(hashes, self._hashes)

    def count_values(self) -> int:
        """Return the number of different values in the column."""
        return len(np.unique(self._hashes))

    def describe_skipped(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))

    def _build_index(self, start: int) -> None:
        hashes, offsets, sizes = array("Q"), array("Q"), array("Q")
        previous, separator = None, self._separator.encode()
        for position, row, problem in _read_rows(self._file, start):
            if problem is None and row.count(separator) < len(self.columns) - 1 and row.strip():
                problem = "truncated"
            if problem or not row.strip():
                previous = None  # no run of rows spans this one
                self.skipped.update([problem] if problem else [])
                continue
            value = row.split(separator, 1)[0].strip()
            if self._column or value[:1] == b'"':
                fields = next(_parse(row, self._separator), [])
                value = fields[self._column].strip().encode() if len(fields) > self._column else b""
            if value == previous:
                sizes[-1] += len(row)
            else:
                previous = value
                hashes.append(hash_value(value))
                offsets.append(position)
                sizes.append(len(row))
        order = np.argsort(np.asarray(hashes), kind="stable")
        self._hashes = np.asarray(hashes, np.uint64)[order]
        self._order = order.astype(np.uint32)
        self._offsets, self._sizes = np.asarray(offsets), np.asarray(sizes)


def read_csv(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a small CSV file with the same encodings and separators, its header included."""
    try:
        with _open_as_utf8(path) as file:
            separator = _find_separator(file.readline(ROW_LIMIT))
            file.seek(0)
            for _, row, problem in _read_rows(file, 0):
                yield from () if problem else _parse(row, separator)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error


def hash_value(value: bytes) -> int:
    """Return a hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")


def _open_as_utf8(path: Path) -> BinaryIO:
    """Open a text file; of one in UTF-16, open a converted copy, which has no name."""
    with open(path, "rb") as file:
        head = file.read(2)
    encoding = "utf-16-le" if head[1:] == b"\0" else "utf-16-be" if head[:1] == b"\0" else None
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    if encoding is None:
        return open(path, "rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (returned)
    try:
        with open(path, encoding=encoding, newline="") as text:
            while block := text.read(1 << 20):
                copy.write(block.encode())
    except UnicodeError as error:
        raise UserError(f"{path}: is no CSV file ({error}); download it again") from error
    copy.seek(0)
    return copy


def _find_separator(header: bytes) -> str:
    return max(_SEPARATORS, key=lambda separator: header.count(separator.encode()))


def _read_rows(file: BinaryIO, position: int) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield each row's position, its bytes, and why it cannot be used, if so. A quoted field may span lines."""
    while row := file.readline(ROW_LIMIT):
        problem, first, size = None, row, len(row)
        if size == ROW_LIMIT:
            problem, more = "too_long", row
            while not more.endswith(b"\n") and (more := file.readline(ROW_LIMIT)):
                size += len(more)
        else:
            while row.count(b'"') % 2 and len(row) < ROW_LIMIT and (more := file.readline(ROW_LIMIT)):
                row += more
            if row.count(b'"') % 2:
                problem, row = "unclosed_quote", first
                file.seek(position + len(first))
            size = len(row)
        yield position, row, problem
        position += size


def _parse(data: bytes, separator: str) -> Iterator[list[str]]:
    """Yield the fields of each row, none for a row that cannot be parsed."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    # Not splitlines(), which also splits at separators of other kinds than line ends.
    reader = csv.reader([f"{line}\n" for line in text.rstrip("\n").split("\n")], delimiter=separator)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield []
