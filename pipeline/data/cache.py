"""Cache of whole shards on the node's local disk, shared by all processes of the node.

    CACHE_DIR/
        lock             held while space is reserved
        <sha256>.part    a shard being fetched by the process that holds its lock, with its final size
        <sha256>.tar     a complete shard, named by its content, so runs and shard sets share it

Invariant: a .tar is read only after its checksum was verified. Its modification time is then set to
`VERIFIED_MTIME_NS`; a later write changes it, and the shard is verified again. The files take at most
`limit_bytes`; the least recently read ones (by access time, set explicitly) are evicted first. A process can
still read a shard that another process evicts, so the shard's disk space is only freed once it is closed.

Locks are flocks (fcntl) on the .part files themselves, so a file whose process was killed is recognized by its
free lock. The filelock package cannot lock a data file, only a lock file beside it, which could never be deleted.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.data.retry import Cancelled
from pipeline.data.storage import LocalStorage, Span
from pipeline.distributed.logging import ALL_RANKS
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

FETCH_BYTES = 8 << 20
VERIFIED_MTIME_NS = 0
POLL_S = 0.1


class CachedShard(NamedTuple):
    """A shard in its original storage."""

    path: str
    """File or URL, for messages."""
    sha256: str
    size: int
    """In bytes."""
    fetch: Callable[[int, int], bytes]
    """Returns the bytes at (offset, size)."""


class ShardCache:
    """A directory of shards with a size limit.

    Args:
        max_open_files: number of shards that stay open for reading.
        stop: cancels all waiting when set.
    """

    def __init__(self, directory: str, limit_bytes: int, max_open_files: int, stop: threading.Event):
        self.directory, self._limit, self._stop = Path(directory), limit_bytes, stop
        self._files = LocalStorage(self.directory, max_open_files)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock(self.directory / "lock").close()
        except OSError as error:
            raise self._directory_error(error) from error

    def read(self, shard: CachedShard, spans: Sequence[Span]) -> list[bytes]:
        """Read spans of a shard, which is fetched first if necessary.

        Raises:
            UserError: If the fetched shard does not match its checksum, or the directory cannot be used.
            Cancelled: If `stop` is set meanwhile.
        """
        name = f"{shard.sha256}.tar"
        while True:
            try:
                if not self._use_verified(self.directory / name, shard):
                    self._files.forget(name)
                    self._provide(shard)
                return self._files.read(name, spans, lambda: None)
            except FileNotFoundError:  # evicted before it was opened
                continue
            except OSError as error:
                raise self._directory_error(error) from error

    def _use_verified(self, path: Path, shard: CachedShard) -> bool:
        """Return whether the file is verified; if so, set its access time."""
        try:
            status = path.stat()
            if status.st_mtime_ns != VERIFIED_MTIME_NS or status.st_size != shard.size:
                return False
            _mark_verified(path)
        except FileNotFoundError:
            return self._files.is_open(path.name)  # evicted, but readable through our open file
        return True

    def _provide(self, shard: CachedShard) -> None:
        """Verify or fetch the shard, unless another process does so first."""
        path, part = (self.directory / f"{shard.sha256}{suffix}" for suffix in (".tar", ".part"))
        with self._lock(part) as file:
            if not _is_named(file, part):  # renamed by the process that held the lock before
                return
            if self._use_verified(path, shard):
                part.unlink()
                return
            os.truncate(file.fileno(), 0)
            if path.exists():
                with open(path, "rb") as cached:
                    intact = hashlib.file_digest(cached, "sha256").hexdigest() == shard.sha256
                if intact:
                    _mark_verified(path)
                    part.unlink()
                    return
                logger.warning(f"{path}: is damaged; fetching {shard.path} again", extra=ALL_RANKS)
                path.unlink()
            try:
                self._reserve(file, shard.size)
                self._fetch(file, shard)
                _mark_verified(part)
                part.rename(path)
            except BaseException:
                part.unlink()
                raise

    def _fetch(self, file: BinaryIO, shard: CachedShard) -> None:
        digest = hashlib.sha256()
        for offset in range(0, shard.size, FETCH_BYTES):
            chunk = shard.fetch(offset, min(FETCH_BYTES, shard.size - offset))
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != shard.sha256:
            raise UserError(
                f"{shard.path}: sha256 does not match the manifest (damaged); restore it or rebuild the set"
            )
        file.flush()
        os.fsync(file.fileno())

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Extend the empty file to `size`: evict shards, and wait for other fetches if that is not enough."""
        while True:
            with self._lock(self.directory / "lock"):
                if self._evict(self._limit - size) <= self._limit - size:
                    os.truncate(file.fileno(), size)
                    return
            self._pause()

    def _evict(self, max_bytes: int) -> int:
        """Remove the least recently read shards until at most `max_bytes` remain; return what remains."""
        shards, total = [], 0
        for path in [*self.directory.glob("*.tar"), *self.directory.glob("*.part")]:
            try:
                if path.suffix == ".part" and self._is_abandoned(path):
                    path.unlink()
                    continue
                status = path.stat()
            except FileNotFoundError:  # renamed meanwhile
                continue
            total += status.st_size
            if path.suffix == ".tar":
                shards.append((status.st_atime_ns, status.st_size, path))
        for _, size, path in sorted(shards):
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _is_abandoned(self, part: Path) -> bool:
        """Return whether the process that fetched into the file was killed."""
        if not part.stat().st_size:  # locked soon: its process has not reserved the space yet
            return False
        file = _try_lock(part)
        if file is None:
            return False
        with file:
            return _is_named(file, part)

    def _lock(self, path: Path) -> BinaryIO:
        """Create or open the file and wait for its lock, which closing the file releases."""
        while (file := _try_lock(path)) is None:
            self._pause()
        return file

    def _pause(self) -> None:
        if self._stop.wait(POLL_S):
            raise Cancelled

    def _directory_error(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"data.cache_dir {self.directory}: {reason}; use a directory on the node's local disk")


def _mark_verified(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), VERIFIED_MTIME_NS))


def _try_lock(path: Path) -> BinaryIO | None:
    """Create or open the file and lock it; return None if another process holds the lock."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (closed by the caller)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Return whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
