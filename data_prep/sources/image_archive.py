"""One archive of images: what `folder` reads where SRC is a tar, a tar.gz or a zip.

Invariant: its samples have the keys and labels that the unpacked folder's would have. Where all files lie in
one top folder (`tar -cf photos.tar photos` makes it so), that folder counts as SRC.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import sniff
from data_prep.pixels import ImageError
from data_prep.source_reader import Reader
from data_prep.sources.containers import TAR_ENDINGS, Entry, entries
from data_prep.sources.folder import HIDDEN
from data_prep.sources.sample import Classes, PlainSource, Sample, key_of


class ArchiveSource(PlainSource):
    """labels: as FolderSource's. Raises UserError when root is no archive, or is damaged or empty."""

    def __init__(self, root: Path, labels: str = "auto"):
        if not _is_archive(root):
            raise UserError(f"SRC {root} is no folder, and no tar, tar.gz or zip archive")
        usable = [entry for entry in entries(root, "") if _rejection_reason(entry) is None]
        tops = {entry.name.partition("/")[:2] for entry in usable}
        self._top = "".join(tops.pop()) if len(tops) == 1 and ("/" in next(iter(tops))) else ""
        folders, loose = set(), []
        for entry in usable:
            first, inside, _ = self._name(entry).partition("/")
            if inside:
                folders.add(first)
            else:
                loose.append(entry)
        labelled = labels == "folders" or (labels == "auto" and folders and not _has_image(root, loose))
        names = sorted(folders, key=lambda name: name.encode("utf-8", "surrogateescape")) if labelled else ()
        layout = "archive of class folders" if names else "archive"
        super().__init__("folder", layout, str(root), Classes(tuple(names)))

    def samples(self) -> Iterator[Sample]:
        number = {name: label for label, name in enumerate(self.classes.names)}
        entry = None
        for entry in entries(self.root, ""):
            name, rejection_reason = self._name(entry), _rejection_reason(entry)
            label = number.get(name.split("/", 1)[0], -1) if "/" in name else -1
            if number and label < 0 and rejection_reason is None:
                rejection_reason = "no_class: lies beside the class folders"
            yield Sample(key_of(name), entry.location, label, rejection_reason)
        if entry is None:
            raise UserError(f"SRC {self.root} is empty: it holds no file at all")

    def _name(self, entry: Entry) -> str:
        return entry.name.removeprefix(self._top)


def _is_archive(path: Path) -> bool:
    if path.name.endswith(TAR_ENDINGS):
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(262)
    except OSError as error:
        raise UserError(f"SRC {path} can't be read: {error.strerror}") from None
    return head.startswith((b"PK\3\4", b"PK\5\6", b"\x1f\x8b")) or head[257:] == b"ustar"


def _rejection_reason(entry: Entry) -> str | None:
    if entry.rejection_reason is None and any(part.startswith(".") for part in entry.name.split("/")):
        return HIDDEN
    return entry.rejection_reason


def _has_image(root: Path, loose: list[Entry]) -> bool:
    reader = Reader(str(root))
    for entry in loose:
        try:
            sniff(reader.read(entry.location))
            return True
        except ImageError as error:
            if error.reason == "no_decoder":
                return True
    return False
