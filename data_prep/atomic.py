"""Write files so that a crash leaves either the old content or the new one.

Invariant: no two processes that share a directory use the same temporary name, on one machine or on several: array
tasks in containers often have equal process ids.
"""

import errno
import os
from pathlib import Path


def process_tag(process: int | None = None) -> str:
    """Return the part of a temporary name that identifies a process of this machine, by default this process."""
    return f"{os.uname().nodename}-{os.getpid() if process is None else process}"


def temporary_name(name: str) -> str:
    """Return this process's temporary name for a file called `name`."""
    return f"{name}.{process_tag()}.tmp"


def atomic_write(path: Path, data: bytes, fsync: bool = True) -> None:
    """Replace `path` by `data` atomically; with `fsync` also with respect to a power failure."""
    temporary = path.with_name(temporary_name(f".{path.name}"))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_path(path: str | os.PathLike) -> None:
    """Flush a file's content, or a directory's entries, to disk if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
