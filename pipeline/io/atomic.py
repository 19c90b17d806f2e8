"""Atomic replacement of files.

Invariant: a file name always refers to the complete old content or to the complete new content, synced to
disk.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError


def atomic_write(path: Path, text: str) -> None:
    """Replace the content of a file, in an existing directory."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, tree: dict) -> None:
    """Replace the content of a file by readable JSON."""
    atomic_write(path, json.dumps(tree, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises UserError if it cannot be read or is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path to write, and rename it to `path` when the block ends without an exception.

    Args:
        path: The file to replace or create.
        shared: Whether other processes may write the same file at the same time.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new" if shared else f"{path.name}.new")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
