"""Source: ADE20K for scene parsing (ADEChallengeData2016), or any data set in its layout; a folder or a zip.

    images/SPLIT/NAME.jpg          the images
    annotations/SPLIT/NAME.png     their label maps, 8-bit: 0 is "other", the classes are numbered from 1
    objectInfo150.txt              the classes; or classes.txt, or the file given by --classes

Invariant: every image is a sample with the label map of its name, or is quarantined; so is a map without an image.
Label maps are stored byte for byte. There is no json.

The names of ADE20K's 150 classes are those of the data set's own objectInfo150.txt.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.pixels import ImageError
from data_prep.source_reader import SourceReader
from data_prep.sources.containers import Entry, iter_entries
from data_prep.sources.sample import Classes, Details, Location, Sample, Source, make_key

CLASS_FILES = ("objectInfo150.txt", "classes.txt")
MAX_CLASSES = 255
"""Class numbers are 8-bit; 0 is "other"."""
_PUBLISHED = {"training": 20_210, "validation": 2_000}
_ARCHIVE = "ADEChallengeData2016.zip"


class Ade20kSource(Source):
    """Images with label maps.

    Args:
        root: The zip, or a folder with the zip or its content, with or without the zip's top folder.
        split: "training" or "validation".
        classes: File with the classes in the order of their numbers; None: the data set's own.
    """

    def __init__(self, root: Path, split: str, classes: Path | None = None):
        self._images: list[tuple[str, Entry]] = []
        self._maps: dict[str, Entry] = {}
        files: dict[str, Location] = {}  # those beside the folders images and annotations
        digest = hashlib.sha256()
        for kind, name, entry in _iter_inputs(root, split):
            stem = name.rpartition(".")[0] or name
            if kind == "images":
                self._images.append((stem, entry))
            elif kind == "annotations":
                # A file with another ending is no label map; it is quarantined under its full name.
                self._maps[stem if name.lower().endswith(".png") else name] = entry
                digest.update(f"{name} {entry.location.size}\n".encode("utf-8", "surrogateescape"))
            elif entry.rejection_reason is None:
                files.setdefault(name, entry.location)
        if not self._images or not self._maps:
            missing = "annotations" if self._images else "images"
            raise UserError(f"SRC {root}: no {missing}/{split}/; expected the content of {_ARCHIVE}")
        names = _read_classes(root, classes, files)
        digest.update("\n".join(names).encode())
        is_ade20k = classes is None and CLASS_FILES[0] in files
        super().__init__(
            "ade20k",
            "zip" if next(iter(self._maps.values())).location.member else "folder",
            str(root),
            Classes(names, annotation="label_map"),
            _PUBLISHED[split] if is_ade20k else None,
            annotations_digest=digest.hexdigest(),
        )
        self._map_of_key = {_key(name): entry.location for name, entry in self._maps.items()}

    def samples(self) -> Iterator[Sample]:
        for name, entry in self._images:
            label_map, reason = self._maps.get(name), entry.rejection_reason
            if reason is None and label_map is None:
                reason = "missing_label_map: there is no label map of this name"
            elif reason is None and label_map and label_map.rejection_reason:
                reason = f"missing_label_map: its label map is rejected ({label_map.rejection_reason})"
            yield Sample(_key(name), entry.location, -1, reason)
        for name in sorted(self._maps.keys() - {name for name, _ in self._images}):
            entry = self._maps[name]
            reason = entry.rejection_reason or "missing_image: there is no image of this name"
            yield Sample(_key(name), entry.location, -1, reason)

    def details(self, key: str) -> Details:
        return Details(label_map=self._map_of_key[key])


def _key(name: str) -> str:
    """Return the key of an image or label map, given its name without its ending."""
    return make_key(f"{name}.png")


def _iter_inputs(root: Path, split: str) -> Iterator[tuple[str, str, Entry]]:
    """Yield (folder, name below it, entry): the folder is "images", "annotations", or "" for other files at the top."""
    archive = root if root.is_file() else root / _ARCHIVE
    if archive.is_file():
        pattern = re.compile(rf"(?:[^/]+/)?(?:(images|annotations)/{split}/(.+)|([^/]+))")
        for entry in iter_entries(root, "" if root.is_file() else _ARCHIVE):
            if match := pattern.fullmatch(entry.name):
                yield match[1] or "", match[2] or match[3], entry
        return
    top = next((top for top in ("", f"{archive.stem}/") if (root / f"{top}images/{split}").is_dir()), "")
    for kind in ("images", "annotations"):
        if (root / f"{top}{kind}/{split}").is_dir():
            for entry in iter_entries(root, f"{top}{kind}/{split}"):
                yield kind, entry.name, entry
    for name in CLASS_FILES:
        path = root / top / name
        if path.is_file():
            yield "", name, Entry(name, Location(top + name, size=path.stat().st_size))


def _read_classes(root: Path, given: Path | None, files: dict[str, Location]) -> tuple[str, ...]:
    """Return the class names: of the given file, else of the data set's."""
    try:
        if given is not None:
            return parse_classes(given.read_text(encoding="utf-8"), f"--classes {given}")
        for name in CLASS_FILES:
            if name in files:
                text = SourceReader(str(root)).read(files[name]).decode()
                return parse_classes(text, f"SRC {root}: {files[name]}")
    except (OSError, UnicodeDecodeError, ImageError) as error:
        raise UserError(f"--classes {given or root}: cannot be read as text ({error})") from error
    raise UserError(f"SRC {root}: has neither {' nor '.join(CLASS_FILES)}; give the class names by --classes FILE")


def parse_classes(text: str, where: str) -> tuple[str, ...]:
    """Parse a list of classes: a name per line; or a table with the number first and the name last.

    A table is separated by tabs, or by commas as ADE20K's objectInfo150.csv; its first line may be a header.

    Args:
        where: Start of error messages.

    Raises:
        UserError: If the numbers are not 1, 2, 3, ..., a name is empty or repeated, or there are more than 255.
    """
    lines = [line.strip("\r\n") for line in text.splitlines() if line.strip()]
    delimiter = "\t" if lines and "\t" in lines[0] else "," if lines and lines[0].startswith("Idx,") else None
    if delimiter is None:
        names = [line.strip() for line in lines]
    else:
        rows = list(csv.reader(lines, delimiter=delimiter))
        rows = rows if rows[0][0].strip().isdigit() else rows[1:]
        for number, row in enumerate(rows, 1):
            if row[0].strip() != str(number):
                raise UserError(f"{where}: class {number} has the number {row[0]!r}; number the classes from 1")
        names = [row[-1].strip() for row in rows]
    repeated = [name for name in names if names.count(name) > 1 or not name]
    if repeated:
        raise UserError(f"{where}: the class name {repeated[0]!r} is empty or given twice")
    if not 1 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{where}: {len(names)} classes; 8-bit label maps have 1 to {MAX_CLASSES}")
    return tuple(names)
