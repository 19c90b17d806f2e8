"""Shard files: write and read USTAR members and DALI's index of them.

Invariant: the bytes are a pure function of the (key, files) that were added; they contain no time, owner or
umask. Headers are therefore built here and not by tarfile, which is also 20 times slower. `read_members`
accepts only what `ShardWriter` writes.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from io import RawIOBase
from typing import BinaryIO, NamedTuple

from data_prep.shard_set import ShardSetError

BLOCK = 512
_SIZE_LIMIT = 8**11  # eleven octal digits
_HEADER = bytearray(BLOCK)
_HEADER[100:108] = b"0000644\0"
_HEADER[108:116] = _HEADER[116:124] = b"0000000\0"  # uid, gid
_HEADER[136:148] = b"00000000000\0"  # mtime
_HEADER[148:156] = b" " * 8  # the checksum is computed with its own field set to spaces
_HEADER[156:157] = b"0"  # a regular file
_HEADER[257:265] = b"ustar\00000"
_HEADER_SUM = sum(_HEADER)
_END = bytes(2 * BLOCK)
_PADDING = [bytes(size) for size in range(BLOCK)]


def member_header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a member's data.

    Raises:
        ValueError: If `name` has more than 100 or non-ASCII characters, or `size` is 8 GiB or more.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100 or not 0 <= size < _SIZE_LIMIT:
        raise ValueError(
            f"{name[:120]!r}: {len(name)} characters, {size} bytes; a USTAR header holds at most 100 characters "
            "and less than 8 GiB"
        )
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    digits = b"%011o\0" % size
    header[124:136] = digits
    header[148:156] = b"%06o\0 " % (_HEADER_SUM + sum(encoded) + sum(digits))
    return bytes(header)


class ShardWriter:
    """Write samples into an open, unbuffered file. `samples` and `bytes` count what was written."""

    def __init__(self, file: RawIOBase):
        self.samples = 0
        self.bytes = 0
        self._descriptor = file.fileno()
        self._hash = hashlib.sha256()
        self._lines: list[str] = []

    def add(self, key: str, files: Sequence[tuple[str, bytes]]) -> None:
        """Append one sample: its (extension, data) files, in this order. Raises OSError if writing fails."""
        words, blocks = [], []
        offset = self.bytes
        for extension, data in files:
            name, size = f"{key}.{extension}", len(data)
            words.append(f"{extension} {offset + BLOCK} {size} {name}")
            blocks += [member_header(name, size), data, _PADDING[-size % BLOCK]]
            offset += BLOCK + size + -size % BLOCK
        self._write(blocks)
        self._lines.append(" ".join(words))
        self.samples += 1

    def finish(self) -> tuple[str, bytes]:
        """Write the end of the archive. Returns the tar's sha256 and the content of its index."""
        self._write([_END])
        index = "\n".join([f"v1.2 {self.samples}", *self._lines, ""]).encode("ascii")
        return self._hash.hexdigest(), index

    def _write(self, blocks: list[bytes]) -> None:
        # Hash while the image is in the CPU cache; writev avoids a copy.
        for block in blocks:
            self._hash.update(block)
        total = sum(map(len, blocks))
        written = os.writev(self._descriptor, blocks)
        self.bytes += total
        if written < total:  # a full disk accepts a part; the next write raises the reason
            rest = memoryview(b"".join(blocks))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class Member(NamedTuple):
    """A tar member; `offset` is the position of its first data byte."""

    name: str
    offset: int
    size: int


def read_members(file: BinaryIO, where: str | os.PathLike) -> Iterator[Member]:
    """Yield the members of a shard's tar in order.

    Raises:
        ShardSetError: At the first header or trailer that ShardWriter would not have written.
    """
    total = file.seek(0, os.SEEK_END)
    position = 0
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header == _END[:BLOCK]:
            if total - position != len(_END) or file.read() != _END[:BLOCK]:
                raise ShardSetError(f"{where}: bytes after the end of the archive at {position:,}")
            return
        member = _parse_header(header, position, where)
        padded = -(-member.size // BLOCK) * BLOCK
        position += BLOCK + padded
        if position > total:
            raise ShardSetError(f"{where}: is truncated inside {member.name!r}")
        yield member


def _parse_header(header: bytes, position: int, where: str | os.PathLike) -> Member:
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        size = int(header[124:135], 8)
        if header == member_header(name, size):
            return Member(name, position + BLOCK, size)
    except ValueError:
        pass
    raise ShardSetError(f"{where}: invalid tar header at {position:,}")
