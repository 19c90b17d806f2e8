"""Source: one tar, tar.gz or zip archive of images, the other form of the `folder` command's SRC.

Invariant: samples have the keys and labels of the unpacked folder. If all files are in one top folder
(`tar -cf photos.tar photos` makes such an archive), this folder counts as SRC.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import is_image
from data_prep.pixels import ImageError
from data_prep.shard_plan import IMAGE_ENDINGS
from data_prep.source_reader import SourceReader
from data_prep.sources.containers import TAR_ENDINGS, Entry, iter_entries
from data_prep.sources.folder import HIDDEN, FolderSource, iter_files
from data_prep.sources.sample import Classes, Location, Source
from data_prep.suggested_command import suggest_command


def open_folder_or_archive(root: Path, split: str, labels: str) -> Source:
    """Open SRC of the `folder` command. `split` only names the shards.

    Raises:
        UserError: If there is nothing to build from, or only files that another command reads.
    """
    if root.is_file():
        _check_holds_images(root)
        return ArchiveSource(root, labels)
    source = FolderSource(root, labels)
    _check_holds_images(root)
    return source


class ArchiveSource(FolderSource):
    """An archive of images; arguments as for FolderSource."""

    def __init__(self, root: Path, labels: str = "auto"):
        if not _is_archive(root):
            raise UserError(f"SRC {root}: neither a folder nor a tar, tar.gz or zip archive")
        self._src, self._container, self._empty_folders = root, root.name, []
        usable = [entry for entry in iter_entries(root.parent, root.name) if _rejection_reason(entry) is None]
        tops = {entry.name.partition("/")[:2] for entry in usable}
        self._top = "".join(tops.pop()) if len(tops) == 1 and ("/" in next(iter(tops))) else ""
        folders, files = set(), []
        for entry in usable:
            first, inside, _ = entry.name.removeprefix(self._top).partition("/")
            if inside:
                folders.add(first)
            else:
                files.append(entry)
        labeled = labels == "folders" or (labels == "auto" and folders and not _any_image(root.parent, files))
        names = sorted(folders, key=lambda name: name.encode("utf-8", "surrogateescape")) if labeled else ()
        layout = "archive of class folders" if names else "archive"
        Source.__init__(self, "folder", layout, str(root.parent), Classes(tuple(names)))

    def _inputs(self) -> Iterator[tuple[str, Location, str | None]]:
        for entry in iter_entries(self.root, self._container):
            yield entry.name.removeprefix(self._top), entry.location, _rejection_reason(entry)


def _check_holds_images(root: Path) -> None:
    """Raise a UserError that names the right command if a folder holds tar or parquet files, and no images."""
    other_files = False
    for name, _, _ in iter_files(root) if root.is_dir() else [(root.name, 0, None)]:
        name = name.lower()
        if name.endswith(IMAGE_ENDINGS):
            return
        other_files |= name.endswith((".parquet", *TAR_ENDINGS) if root.is_dir() else ".parquet")
    if other_files:
        raise UserError(f"SRC {root}: no images in files; {suggest_command(root)}")


def _is_archive(path: Path) -> bool:
    if path.name.endswith(TAR_ENDINGS):
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(262)
    except OSError as error:
        raise UserError(f"SRC {path}: cannot be read: {error.strerror}; check the path and its permissions") from error
    return head.startswith((b"PK\3\4", b"PK\5\6", b"\x1f\x8b")) or head[257:] == b"ustar"


def _rejection_reason(entry: Entry) -> str | None:
    if entry.rejection_reason is None and any(part.startswith(".") for part in entry.name.split("/")):
        return HIDDEN
    return entry.rejection_reason


def _any_image(root: Path, entries: list[Entry]) -> bool:
    reader = SourceReader(str(root))
    for entry in entries:
        try:
            if is_image(reader.read(entry.location)):
                return True
        except ImageError:  # too large or damaged
            continue
    return False
