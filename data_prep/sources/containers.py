"""List the files of folders, tar, tar.gz and zip archives, and of tars inside tars, without unpacking.

Invariant: only regular files with names inside the archive are offered for reading; links, devices, sparse files,
absolute and climbing names become rejected entries. Of tars joined by `cat`, the members of all are listed. A damaged
archive raises UserError; it never causes an endless loop, nor a read of more than a header's size into memory.
"""

import functools
import io
import logging
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from data_prep.errors import UserError
from data_prep.sources.folder import iter_files
from data_prep.sources.sample import Location, Storage

logger = logging.getLogger(__name__)

_HEADER_LIMIT = 1 << 20  # bytes; tarfile reads pax and long-name headers at once
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
# What tarfile, zipfile and indexed_gzip raise for damaged archives, besides their own errors.
_READ_ERRORS = (OSError, EOFError, ValueError, LookupError, OverflowError, RuntimeError, struct.error)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a container; `rejection_reason` is "code: detail" if it must not be read."""

    name: str
    location: Location
    rejection_reason: str | None = None
    stored_name: str = ""  # of a tar member: its name with a leading "./", which `name` lacks

    @property
    def basename(self) -> str:
        return self.name.rpartition("/")[2]


def iter_entries(root: str | os.PathLike, container: str) -> Iterator[Entry]:
    """Yield every file in a folder (ordered by name), tar, tar.gz or zip (in the archive's order).

    Args:
        root: The source's root.
        container: Path of the folder or archive below `root`; "" for `root` itself, of whose
            entries the quarantine would not show the name if it is an archive.

    Raises:
        UserError: If it cannot be read to its end.
    """
    path = os.path.join(root, container) if container else os.fspath(root)
    if os.path.isdir(path):
        for name, size, rejection_reason in iter_files(path):
            below = f"{container}/{name}" if container else name
            yield Entry(name, Location(below, "", 0, size, Storage.FILE), rejection_reason)
    elif _starts_with(path, b"PK"):
        yield from _zip_entries(path, container)
    else:
        file, storage = open_container(path)
        size = os.path.getsize(path) if storage == Storage.STORED else None
        for entry in tar_entries(file, size, container or path, storage):
            yield entry if container else replace(entry, location=entry.location._replace(container=""))


def iter_nested_entries(root: str | os.PathLike, outer: Entry) -> Iterator[Entry]:
    """Yield the entries of an archive that is a member of a tar, or a file of a folder.

    Raises:
        UserError: If it is compressed inside another archive, or cannot be read to its end.
    """
    location = outer.location
    if location.storage == Storage.FILE:
        yield from iter_entries(root, location.container)
        return
    if location.storage == Storage.DEFLATED or outer.basename.endswith("gz"):
        raise UserError(f"{location}: a compressed archive inside an archive; unpack the outer one first")
    path = os.path.join(root, location.container) if location.container else os.fspath(root)
    file, storage = open_container(path)
    part = _Part(file, location.offset, location.size)
    for entry in tar_entries(part, location.size, str(location), storage):
        offset = location.offset + entry.location.offset
        member = f"{location.member}/{entry.name}"
        place = entry.location._replace(container=location.container, member=member, offset=offset)
        yield replace(entry, location=place)


def open_container(path: str) -> tuple[BinaryIO, Storage]:
    """Open a seekable file of an archive's (decompressed) bytes."""
    if _starts_with(path, b"\x1f\x8b"):
        return open_gzip(path), Storage.GZIPPED
    try:
        return open(path, "rb"), Storage.STORED
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error


@functools.cache
def open_gzip(path: str) -> BinaryIO:
    """Open a gzip file for random access. Forked workers inherit the index that planning has built."""
    import indexed_gzip

    # Each seek point takes 32 kB: at most 128 MB per file, whatever its size.
    spacing = max(1 << 20, os.path.getsize(path) // 4096)
    return indexed_gzip.IndexedGzipFile(path, spacing=spacing, drop_handles=True)


def _unsafe_name(name: str) -> str | None:
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
        return "unsafe_name: an absolute name"
    if ".." in name.split("/"):
        return "unsafe_name: a name that climbs out of the archive"
    if "\0" in name or not name:
        return "unsafe_name: an empty or broken name"
    return None


def tar_entries(file: "BinaryIO | io.RawIOBase", size: int | None, where: str, storage: Storage) -> Iterator[Entry]:
    """Yield the entries of a tar, or of several joined by `cat`; `size` is the archive's in bytes if known.

    Raises:
        UserError: After the last complete entry of a damaged or truncated archive; it names `where`.
    """
    part = _Part(file, 0, size)
    start: int | None = 0
    try:
        while start is not None:
            end = yield from _members(part, start, where, storage)
            start = _find_next_tar(part, end, where)
    except (tarfile.TarError, *_READ_ERRORS) as error:
        raise _damaged(where, error) from error


def _members(part: "_Part", start: int, where: str, storage: Storage) -> Generator[Entry, None, int]:
    """Yield the entries of the tar that begins at byte `start`; return the position of its end-of-archive mark."""
    last = -1
    with tarfile.open(fileobj=part.tail(start), mode="r:", errorlevel=2) as tar:
        while (member := tar.next()) is not None:
            # tarfile keeps every header in this list, which typeshed lacks.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            # Python 3.11's tarfile follows negative sizes backwards in an endless loop.
            if member.size < 0 or tar.offset <= last:
                raise tarfile.ReadError("a member of negative size")
            last = tar.offset
            if member.isdir():
                continue
            name = member.name.removeprefix("./")
            location = Location(where, name, start + member.offset_data, member.size, storage)
            rejection_reason = _tar_rejection_reason(member) or _unsafe_name(name)
            # The size of a sparse file includes its holes, which are not stored.
            if rejection_reason is None and not part.has_bytes_before(location.offset + location.size):
                raise tarfile.ReadError("unexpected end of data")
            yield Entry(name, location, rejection_reason, member.name)
        end = start + tar.offset
    # tarfile also stops at a damaged header and at the end of the file; members may be missing then.
    block = part.read_at(end, tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        problem = "no end-of-archive mark" if len(block) < tarfile.BLOCKSIZE else "a damaged header"
        raise tarfile.ReadError(f"{problem} at byte {end:,}")
    return end


def _find_next_tar(part: "_Part", end: int, where: str) -> int | None:
    """Return where another tar begins behind the end-of-archive mark at byte `end`; None if there is none."""
    position = end
    while data := part.read_at(position, _HEADER_LIMIT):
        content = data.lstrip(b"\0")
        if not content:
            position += len(data)
            continue
        position += (len(data) - len(content)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        try:
            tarfile.TarInfo.frombuf(part.read_at(position, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.TarError:
            _log_once(f"{where}: ignoring what follows its end, from byte {position:,}; it is no tar")
            return None
        return position
    return None


@functools.cache
def _log_once(message: str) -> None:
    """Log a warning, although archives are listed several times."""
    logger.warning(message)


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: damaged or truncated ({error}); download or copy it again")


def _tar_rejection_reason(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "link: a link, which is never followed"
    if not member.isreg() or member.issparse():
        return "special_file: no regular file"
    return None


def _zip_entries(path: str, container: str) -> Iterator[Entry]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                file.seek(info.header_offset)
                header = file.read(_ZIP_LOCAL_HEADER.size)
                signature, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(header)
                if signature != b"PK\3\4":
                    raise zipfile.BadZipFile(f"no header for {info.filename!r}")
                offset = info.header_offset + _ZIP_LOCAL_HEADER.size + name_length + extra_length
                storage = Storage.DEFLATED if info.compress_type == zipfile.ZIP_DEFLATED else Storage.STORED
                location = Location(container, info.filename, offset, info.compress_size, storage)
                rejection_reason = _zip_rejection_reason(info) or _unsafe_name(info.orig_filename)
                yield Entry(info.filename, location, rejection_reason)
    except (zipfile.BadZipFile, *_READ_ERRORS) as error:
        raise _damaged(path, error) from error


def _zip_rejection_reason(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "link: a link, which is never followed"
    if kind not in (0, stat.S_IFREG):
        return "special_file: no regular file"
    if info.flag_bits & 1:
        return "encrypted: an encrypted member"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compression: method {info.compress_type} is not read"
    return None


def _starts_with(path: str, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error


class _Part(io.RawIOBase):
    """A read-only view of a range of a file for tarfile; rejects reads that no header needs."""

    def __init__(self, file: "BinaryIO | io.RawIOBase", start: int, size: int | None):
        self._file, self._start, self.size, self._position = file, start, size, 0

    def tail(self, start: int) -> "_Part":
        """Return a view from byte `start` of this one."""
        return _Part(self._file, self._start + start, None if self.size is None else self.size - start)

    def has_bytes_before(self, position: int) -> bool:
        """Return whether the file reaches to `position`. If its size is not known, reads the byte before."""
        return bool(self.read_at(position - 1, 1)) if self.size is None else position <= self.size

    def read_at(self, position: int, count: int) -> bytes:
        self.seek(position)
        return self.read(count)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < 0:
            raise tarfile.ReadError("a position outside of the archive")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header claims {count:,} bytes")
        if self.size is not None:
            count = max(0, min(count, self.size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data
