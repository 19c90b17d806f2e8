"""What lies in an archive, without unpacking it: tar, tar.gz, zip, and tars inside of tars.

Invariant: only regular files with names inside of the archive are ever offered for reading; links, devices,
absolute and climbing names come out as refused entries. A damaged archive raises UserError; it never hangs,
and never makes us read more than a header's worth into memory.
"""

import functools
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from data_prep.errors import UserError
from data_prep.sources.folder import files_below
from data_prep.sources.sample import Location, Storage

_HEADER_LIMIT = 1 << 20  # bytes; pax and long-name headers that tarfile reads in one piece
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class Entry:
    """name: path inside of the archive or folder. refusal: "code: detail" when it must not be read."""

    name: str
    location: Location
    rejection_reason: str | None = None

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]


def entries(root: str | os.PathLike, container: str) -> Iterator[Entry]:
    """Every file in a folder, tar, tar.gz or zip, in the archive's order (a folder's by name). container:
    path below root. Raises UserError when it can't be read to its end."""
    path = os.path.join(root, container) if container else os.fspath(root)
    if os.path.isdir(path):
        for name, size, rejection_reason in files_below(path):
            below = f"{container}/{name}" if container else name
            yield Entry(name, Location(below, "", 0, size, Storage.FILE), rejection_reason)
    elif _starts_with(path, b"PK"):
        yield from _zip_entries(path, container)
    else:
        file, storage = open_container(path)
        yield from _tar_entries(
            file, os.path.getsize(path) if storage == Storage.STORED else None, container, storage
        )


def entries_inside(root: str | os.PathLike, outer: Entry) -> Iterator[Entry]:
    """The entries of a tar that is itself a member of a tar, or a file of a folder."""
    location = outer.location
    if location.storage == Storage.FILE:
        yield from entries(root, location.container)
        return
    if location.storage == Storage.DEFLATED or outer.base.endswith("gz"):
        raise UserError(
            f"{location} is a compressed archive inside of an archive: unpack the outer one first"
        )
    file, storage = open_container(
        os.path.join(root, location.container) if location.container else os.fspath(root)
    )
    inner = _tar_entries(_Part(file, location.offset, location.size), location.size, str(location), storage)
    for entry in inner:
        offset = location.offset + entry.location.offset
        member = f"{location.member}/{entry.name}"
        place = entry.location._replace(container=location.container, member=member, offset=offset)
        yield replace(entry, location=place)


def open_container(path: str) -> tuple[BinaryIO, Storage]:
    """A seekable file of the archive's (gunzipped) bytes."""
    if _starts_with(path, b"\x1f\x8b"):
        return open_gzip(path), Storage.GZIPPED
    try:
        return open(path, "rb"), Storage.STORED
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


@functools.cache
def open_gzip(path: str) -> BinaryIO:
    """Random access to a gzip file's content. What it learns while the build is planned, forked workers
    inherit."""
    import indexed_gzip

    # Each point to start from takes 32 kB: at most 128 MB a file, however large it is.
    spacing = max(1 << 20, os.path.getsize(path) // 4096)
    return indexed_gzip.IndexedGzipFile(path, spacing=spacing, drop_handles=True)


def unsafe_name(name: str) -> str | None:
    """Why a member's name must not be trusted, or None."""
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
        return "unsafe_name: an absolute name"
    if ".." in name.split("/"):
        return "unsafe_name: a name that climbs out of the archive"
    if "\0" in name or not name:
        return "unsafe_name: an empty or broken name"
    return None


def _tar_entries(file: BinaryIO, size: int | None, where: str, storage: Storage) -> Iterator[Entry]:
    """size: bytes of the archive where they are known, to tell a cut one."""
    part = _Part(file, 0, size)
    last = -1
    try:
        with tarfile.open(fileobj=part, mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every header it has seen
                # 3.11's tarfile follows negative sizes backwards, for ever
                if member.size < 0 or tar.offset <= last:
                    raise tarfile.ReadError("a member of negative size")
                last = tar.offset
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                location = Location(where, name, member.offset_data, member.size, storage)
                if size is not None and location.offset + location.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield Entry(name, location, _tar_refusal(member) or unsafe_name(name))
            _check_end(part, tar.offset)
    except UserError:
        raise
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        RecursionError,
        IndexError,
        KeyError,
        struct.error,
    ) as error:
        raise UserError(f"{where} is damaged or ends early ({error}): download or copy it again") from None
    except Exception as error:  # indexed_gzip's own errors have no common base
        if type(error).__module__.startswith("indexed_gzip"):
            raise UserError(
                f"{where} is damaged or ends early ({error}): download or copy it again"
            ) from None
        raise


def _tar_refusal(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "link: a link, which is never followed"
    if not member.isreg() or member.issparse():
        return "special_file: no regular file"
    return None


def _check_end(part: "_Part", offset: int) -> None:
    """An archive ends with a block of zeros; where the file just stops, what followed is lost."""
    part.seek(max(0, offset - tarfile.BLOCKSIZE))
    tail = part.read(2 * tarfile.BLOCKSIZE)
    if bytes(tarfile.BLOCKSIZE) not in tail:
        raise tarfile.ReadError("no end-of-archive mark")


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
                yield Entry(info.filename, location, _zip_refusal(info) or unsafe_name(info.orig_filename))
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OSError,
        ValueError,
        struct.error,
        OverflowError,
        RuntimeError,
        IndexError,
    ) as error:
        raise UserError(f"{path} is damaged or ends early ({error}): download or copy it again") from None


def _zip_refusal(info: zipfile.ZipInfo) -> str | None:
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
        raise UserError(f"{path} can't be read: {error.strerror}") from None


class _Part:
    """A read-only view of a stretch of a file, as tarfile wants one; refuses reads that no header needs."""

    def __init__(self, file: BinaryIO, start: int, size: int | None):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < 0:
            raise tarfile.ReadError("a position outside of the archive")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _HEADER_LIMIT:
            raise tarfile.ReadError("a header of impossible size")
        if self._size is not None:
            count = max(0, min(count, self._size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data
