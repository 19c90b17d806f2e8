"""Files that are replaced whole, and small ones that are read whole.

Invariant: under a file's name there is all of its new content, and that is on the disk, or what was there
before.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError


def atomic_write(path: Path, text: str) -> None:
    """Make `text` the content of the file, in a directory that is there."""
    with atomic_path(path) as new:
        new.write_text(text)


def write_json(path: Path, tree: dict) -> None:
    """Make `tree` the content of the file, for people too."""
    atomic_write(path, json.dumps(tree, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """UserError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no JSON that can be read: {error}") from None


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Where to write the file that takes the place of `path` when the block is done; nothing is left of it
    where the block raises. shared: other processes may do the same at the same time."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new" if shared else f"{path.name}.new")
    try:
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        with suppress(OSError):
            new.unlink()
