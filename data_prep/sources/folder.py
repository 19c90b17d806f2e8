"""Source: a folder of images, whose subfolders are classes.

Invariant: every file below the folder is an input, whatever its name ends with; links, special files and
hidden ones are rejected, so nothing outside the folder is read. Files are in the order of their names.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import is_image
from data_prep.shard_set import BUILD_DIRECTORY, FORMAT, MANIFEST
from data_prep.sources.sample import Classes, Location, Sample, Source, Storage, make_key

HIDDEN = "hidden: its name begins with a dot"


class FolderSource(Source):
    """A folder of images.

    Args:
        root: The folder.
        labels: "folders" takes the first folder of a path as the class; "none" gives no labels; "auto" gives
            labels if there are subfolders and no image is next to them.
    """

    def __init__(self, root: Path, labels: str = "auto"):
        if not root.is_dir():
            raise UserError(f"SRC {root}: not a folder")
        self._src = root
        entries = [entry for entry in _scan(root) if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in (root, *(root / name for name in folders)):
            if _is_shard_set(path):
                raise UserError(f"SRC {path}: already a shard set; pass it to --data, or the folder of its images here")
        files = (entry.path for entry in entries if entry.is_file(follow_symlinks=False))
        labeled = labels == "folders" or (
            labels == "auto" and bool(folders) and not any(_is_image_file(path) for path in files)
        )
        names = tuple(name for name in folders if next(iter_files(root, name), None)) if labeled else ()
        super().__init__("folder", "class folders" if names else "plain folder", str(root), Classes(names))
        self._empty_folders = [name for name in folders if names and name not in names]

    def notes(self) -> list[str]:
        return [f"not a class, because it has no file: {name}" for name in self._empty_folders]

    def samples(self) -> Iterator[Sample]:
        label_of = {name: label for label, name in enumerate(self.classes.names)}
        empty = True
        for name, location, rejection_reason in self._inputs():
            empty = False
            label = label_of.get(name.split("/", 1)[0], -1) if "/" in name else -1
            if label_of and label < 0 and rejection_reason is None:
                rejection_reason = "no_class: lies beside the class folders"
            yield Sample(make_key(name), location, label, rejection_reason)
        if empty:
            raise UserError(f"SRC {self._src}: contains no file")

    def _inputs(self) -> Iterator[tuple[str, Location, str | None]]:
        """Yield (name, location, rejection reason or None) of every file."""
        for name, size, rejection_reason in iter_files(self.root):
            yield name, Location(name, "", 0, size, Storage.FILE), rejection_reason


def iter_files(root: str | os.PathLike, below: str = "") -> Iterator[tuple[str, int, str | None]]:
    """Yield (path below root with "/", bytes, rejection reason or None) of every file, ordered by name."""
    stack = _scan(os.path.join(root, below))[::-1]
    start = len(os.path.join(root, ""))
    while stack:
        entry = stack.pop()
        name = entry.path[start:]
        if entry.name.startswith("."):
            yield name, 0, HIDDEN
        elif entry.is_file(follow_symlinks=False):
            yield name, entry.stat(follow_symlinks=False).st_size, None
        elif entry.is_dir(follow_symlinks=False):
            stack += reversed(_scan(entry.path))
        elif entry.is_symlink():
            yield name, 0, "link: a symbolic link, which is never followed"
        else:
            yield name, 0, "special_file: neither a file nor a folder"


def _scan(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; check the path and its permissions") from error


def _is_shard_set(folder: Path) -> bool:
    """Return whether a folder holds a shard set, complete or not."""
    if (folder / BUILD_DIRECTORY / "build.json").is_file():
        return True
    try:
        with open(folder / MANIFEST, "rb") as file:
            return FORMAT.encode() in file.read(100)
    except OSError:
        return False


def _is_image_file(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return is_image(file.read(64))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
