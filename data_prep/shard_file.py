"""One shard as bytes: USTAR members one after the other, and DALI's index of them.

Invariant: the bytes are a pure function of the (key, files) that were added. Nothing of the machine (time,
owner, umask) gets in, which is why the headers are made here and not by tarfile, which is also 20 times
slower. `read_members` accepts only what `ShardWriter` writes.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from io import RawIOBase
from typing import BinaryIO, NamedTuple

from data_prep.shard_set import ShardSetError

BLOCK = 512
KEY_LIMIT = 90
"""Characters: with the longest extension a name stays inside USTAR's 100."""
KEY = re.compile(rf"(?!__)[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}")
"""No dot, slash or space, so that DALI and webdataset agree on where the key ends."""

_SIZE_LIMIT = 8**11  # eleven octal digits
_HEADER = bytearray(BLOCK)
_HEADER[100:108] = b"0000644\0"
_HEADER[108:116] = _HEADER[116:124] = b"0000000\0"  # uid, gid
_HEADER[136:148] = b"00000000000\0"  # mtime
_HEADER[148:156] = b" " * 8  # the checksum's own field counts as spaces
_HEADER[156:157] = b"0"  # a regular file
_HEADER[257:265] = b"ustar\00000"
_HEADER_SUM = sum(_HEADER)
_END = bytes(2 * BLOCK)
_PADDING = [bytes(size) for size in range(BLOCK)]


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data. name: at most 100 ASCII characters; size in bytes, below 8
    GiB."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or not 0 <= size < _SIZE_LIMIT:
        raise ValueError(f"{name[:120]!r} with {size} bytes does not fit into a USTAR header")
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    digits = b"%011o\0" % size
    header[124:136] = digits
    header[148:156] = b"%06o\0 " % (_HEADER_SUM + sum(encoded) + sum(digits))
    return bytes(header)


class ShardWriter:
    """Packs samples into an open, unbuffered file; `finish` returns what the manifest wants to know."""

    def __init__(self, file: RawIOBase):
        self.samples = 0
        self.bytes = 0
        self._descriptor = file.fileno()
        self._hash = hashlib.sha256()
        self._lines: list[str] = []

    def add(self, key: str, files: Sequence[tuple[str, bytes]]) -> None:
        """files: (extension, data) in the order in which they are to lie. Raises OSError when writing
        fails."""
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
        """Ends the archive. Returns the tar's sha256 and the index's bytes."""
        self._write([_END])
        index = "\n".join([f"v1.2 {self.samples}", *self._lines, ""]).encode("ascii")
        return self._hash.hexdigest(), index

    def _write(self, blocks: list[bytes]) -> None:
        # Hashed here, while the image is still in the processor's cache, and written without being copied.
        for block in blocks:
            self._hash.update(block)
        total = sum(map(len, blocks))
        written = os.writev(self._descriptor, blocks)
        self.bytes += total
        if written < total:  # a full disk takes a part; the next write then says why
            rest = memoryview(b"".join(blocks))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class Member(NamedTuple):
    name: str
    offset: int
    """Of the first data byte."""
    size: int


def read_members(file: BinaryIO, where: str | os.PathLike) -> Iterator[Member]:
    """Yields the members of a shard's tar in order. Raises ShardSetError at the first byte of structure that
    ShardWriter would not have written."""
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
            raise ShardSetError(f"{where} ends inside of {member.name!r}")
        yield member


def _parse_header(header: bytes, position: int, where: str | os.PathLike) -> Member:
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        size = int(header[124:135], 8)
        if header == member_header(name, size):
            return Member(name, position + BLOCK, size)
    except ValueError:
        pass
    raise ShardSetError(f"{where}: no tar header of a shard at {position:,}")
