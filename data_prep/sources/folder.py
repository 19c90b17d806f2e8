"""A folder of images. Sub-folders, where there are any, are classes.

Invariant: every file below the folder is an input, whatever its ending; links, special files and hidden ones
are refused, so that nothing outside of the folder is ever read. Files come in the order of their names.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import sniff
from data_prep.pixels import ImageError
from data_prep.sources.sample import Classes, Location, PlainSource, Sample, Storage, key_of

LABELS = ("auto", "folders", "none")
HIDDEN = "hidden: its name begins with a dot"


class FolderSource(PlainSource):
    """labels: "folders" takes the first folder of a file's path as its class, "none" gives no labels, "auto"
    gives them when there are sub-folders and no image lies beside them.

    Raises UserError when there is no such folder or nothing in it.
    """

    def __init__(self, root: Path, labels: str = "auto"):
        if not root.exists():
            raise UserError(f"SRC {root} does not exist")
        if not root.is_dir():
            raise UserError(f"SRC {root} is no folder")
        entries = [entry for entry in _scan(root) if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        loose = (entry.path for entry in entries if entry.is_file(follow_symlinks=False))
        labelled = labels == "folders" or (
            labels == "auto" and bool(folders) and not any(_begins_like_an_image(path) for path in loose)
        )
        names = tuple(name for name in folders if next(files_below(root, name), None)) if labelled else ()
        super().__init__("folder", "class folders" if names else "plain folder", str(root), Classes(names))

    def samples(self) -> Iterator[Sample]:
        number = {name: label for label, name in enumerate(self.classes.names)}
        found = False
        for name, size, rejection_reason in files_below(self.root):
            found = True
            label = number.get(name.split("/", 1)[0], -1)
            if number and label < 0 and rejection_reason is None:
                rejection_reason = "no_class: lies beside the class folders"
            yield Sample(key_of(name), Location(name, "", 0, size, Storage.FILE), label, rejection_reason)
        if not found:
            raise UserError(f"SRC {self.root} is empty: it holds no file at all")


def files_below(root: str | os.PathLike, below: str = "") -> Iterator[tuple[str, int, str | None]]:
    """(path below root with "/", bytes, refusal or None) of every file, in the order of names."""
    waiting = _scan(os.path.join(root, below))[::-1]  # of folders inside of folders, the innermost last
    start = len(os.path.join(root, ""))
    while waiting:
        entry = waiting.pop()
        name = entry.path[start:]
        if entry.name.startswith("."):
            yield name, 0, HIDDEN
        elif entry.is_file(follow_symlinks=False):
            yield name, entry.stat(follow_symlinks=False).st_size, None
        elif entry.is_dir(follow_symlinks=False):
            waiting += reversed(_scan(entry.path))
        elif entry.is_symlink():
            yield name, 0, "link: a symbolic link, which is never followed"
        else:
            yield name, 0, "special_file: neither a file nor a folder"


def _scan(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(sniff(file.read(64)))
    except ImageError as error:
        return error.reason == "no_decoder"
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
