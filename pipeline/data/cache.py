"""Whole shards on the node's own disk: fetched once, shared by all processes of the node.

    CACHE_DIR/
        lock             held while room is made
        <sha256>.part    being fetched, by whoever holds its lock; its full size is reserved from the start
        <sha256>.tar     a whole shard, named by its content: any run and any set may use it

Invariant: a .tar is read only after its bytes had the checksum that names it. That is noted in its
modification time, `VERIFIED`: whoever writes to the file later changes it, and the shard is checked anew. The
files take at most the bound; those read longest ago (by their access time, which is kept by hand) go first.
A process reads on in a shard that another one evicts, so such a shard's space is free only when it is closed.
"""

import fcntl
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.data.retry import Cancelled
from pipeline.data.storage import LocalStorage, Span
from pipeline.errors import UserError

CHUNK = 8 << 20
VERIFIED = 0
"""Modification time, in nanoseconds since 1970, of a file whose bytes were checked."""
POLL = 0.1  # seconds


class CachedShard(NamedTuple):
    """A shard where it comes from."""

    where: str
    """For messages."""
    sha256: str
    bytes: int
    fetch: Callable[[int, int], bytes]
    """(offset, size) to bytes."""


class ShardCache:
    """A bounded directory of shards."""

    def __init__(self, directory: str, limit_bytes: int, open_files: int, stop: threading.Event):
        self.directory, self._limit, self._stop = Path(directory), limit_bytes, stop
        self._files = LocalStorage(self.directory, open_files)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._flock(self.directory / "lock", wait=True).close()
        except OSError as error:
            raise self._unusable(error) from None

    def read(self, shard: CachedShard, spans: Sequence[Span]) -> list[bytes]:
        """Parts of a shard, which is fetched where it is not here yet.

        Raises what `shard.fetch` raises; UserError where its bytes are not those of its checksum or the
        directory cannot be used; Stopped.
        """
        name = f"{shard.sha256}.tar"
        while True:
            try:
                if not self._is_verified(self.directory / name, shard):
                    self._files.forget(name)
                    self._provide(shard)
                return self._files.read(name, spans, lambda: None)
            except FileNotFoundError:  # evicted before it was opened
                continue
            except OSError as error:
                raise self._unusable(error) from None

    def _is_verified(self, path: Path, shard: CachedShard) -> bool:
        """Also notes that the shard is in use."""
        try:
            status = path.stat()
            if status.st_mtime_ns != VERIFIED or status.st_size != shard.bytes:
                return False
            os.utime(path, ns=(time.time_ns(), VERIFIED))
        except FileNotFoundError:
            return self._files.is_open(path.name)  # evicted, but ours to read to the end
        return True

    def _provide(self, shard: CachedShard) -> None:
        """Make the shard be there, by this process or another."""
        path, part = (self.directory / f"{shard.sha256}{suffix}" for suffix in (".tar", ".part"))
        with self._flock(part, wait=True) as file:
            if not _is_at(file, part):  # its last holder renamed it
                return
            if self._is_verified(path, shard):
                part.unlink()
                return
            os.truncate(file.fileno(), 0)
            if path.exists():
                with open(path, "rb") as found:
                    if hashlib.file_digest(found, "sha256").hexdigest() == shard.sha256:
                        os.utime(path, ns=(time.time_ns(), VERIFIED))
                        part.unlink()
                        return
                print(
                    f"warning: {path}: is damaged; fetching {shard.where} again", file=sys.stderr, flush=True
                )
                path.unlink()
            try:
                self._reserve(file, shard.bytes)
                self._fetch(file, shard)
                os.utime(part, ns=(time.time_ns(), VERIFIED))
                part.rename(path)
            except BaseException:
                part.unlink()
                raise

    def _fetch(self, file: BinaryIO, shard: CachedShard) -> None:
        digest = hashlib.sha256()
        for offset in range(0, shard.bytes, CHUNK):
            chunk = shard.fetch(offset, min(CHUNK, shard.bytes - offset))
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != shard.sha256:
            raise UserError(
                f"{shard.where}: its sha256 is not the manifest's: it is damaged; restore it, or build the "
                "shard set anew"
            )
        file.flush()
        os.fsync(file.fileno())

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give the empty `file` its size; evict for it, and wait while others' fetches leave no room."""
        while True:
            with self._flock(self.directory / "lock", wait=True):
                if self._evict(self._limit - size) <= self._limit - size:
                    os.truncate(file.fileno(), size)
                    return
            self._pause()

    def _evict(self, goal: int) -> int:
        """Remove the shards read longest ago until at most `goal` bytes are left. Returns what is left."""
        shards, total = [], 0
        for path in [*self.directory.glob("*.tar"), *self.directory.glob("*.part")]:
            try:
                if path.suffix == ".part" and self._is_left_over(path):
                    path.unlink()
                    continue
                status = path.stat()
            except FileNotFoundError:  # renamed meanwhile
                continue
            total += status.st_size
            if path.suffix == ".tar":
                shards.append((status.st_atime_ns, status.st_size, path))
        for _, size, path in sorted(shards):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _is_left_over(self, part: Path) -> bool:
        if not part.stat().st_size:  # nothing is reserved yet
            return False
        file = self._flock(part, wait=False)
        if file is None:
            return False
        with file:
            return _is_at(file, part)

    def _flock(self, path: Path, wait: bool) -> BinaryIO | None:
        """The file, opened and locked; without `wait`, None where another holds it."""
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (the caller's)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if not wait:
                    file.close()
                    return None
                self._pause()

    def _pause(self) -> None:
        if self._stop.wait(POLL):
            raise Cancelled

    def _unusable(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(
            f"data.cache_dir {self.directory}: {reason}; give a directory on the node's own disk"
        )


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
