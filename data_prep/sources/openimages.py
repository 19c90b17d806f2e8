"""Source: OpenImages V4 to V7. Image folders or archives by split, and metadata CSVs anywhere below SRC.

Invariant: attribution is kept; each sample's json has the image's license, author and source. The CSVs are
recognized by their columns, and belong to a split by their name. One that matches no image is an error, and what cannot
be read of the others is counted.

The json of a sample, each part only if SRC has its CSV:
    image_id; license, author, author_profile_url, title, original_url, landing_url; rotation (degrees
    counter-clockwise, applied to the pixels); labels: {positive, negative: [[id, name]] verified by people,
    machine: [[id, name, confidence]]}; boxes: [{label: [id, name], xmin, xmax, ymin, ymax (as in the CSV:
    0 to 1 of the image before `rotation`), and the CSV's flags, -1 for unknown}]
"""

import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.containers import TAR_ENDINGS, iter_entries
from data_prep.sources.csv_rows import CsvRows, hash_value, read_csv
from data_prep.sources.sample import Details, Sample, Source, make_key

_ATTRIBUTION = {
    "license": "License",
    "author": "Author",
    "author_profile_url": "AuthorProfileURL",
    "title": "Title",
    "original_url": "OriginalURL",
    "landing_url": "OriginalLandingURL",
}
_SIDES = ("XMin", "XMax", "YMin", "YMax")
_COLUMNS = {  # by table: columns by any of which it is recognized, and those that it must have
    "attribution": ({"License", "Author", "OriginalURL", "Rotation"}, {"License", "Author", "OriginalURL"}),
    "boxes": (set(_SIDES), {"LabelName", *_SIDES}),
    "labels": ({"Confidence"}, {"Source", "LabelName", "Confidence"}),
}
_MIN_MATCHES = 0.01
"""Share of the images, or of a table's images if they are fewer, that the table must match."""
_BOX_FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")


class OpenImagesSource(Source):
    """OpenImages with attribution, image labels and boxes; split is "train", "validation" or "test"."""

    def __init__(self, root: Path, split: str):
        if not root.is_dir():
            raise UserError(f"SRC {root}: not a folder")
        self._containers = _find_containers(root, split)
        if not self._containers:
            raise UserError(f"SRC {root}: no {split} images; expected {split}/ID.jpg, or {split}_0.tar.gz, ...")
        archives = [name for name in self._containers if name.endswith(TAR_ENDINGS)]
        super().__init__("openimages", "archives" if archives else "folder", str(root))
        self._names: dict[str, str] = {}
        self._tables: dict[str, list[CsvRows]] = {table: [] for table in _COLUMNS}
        self._unused: list[Path] = []
        self._hashes = array("Q")  # of the images' ids
        for path in sorted(root.rglob("*.csv")):
            if path.is_file():
                self._add_csv(path, split)

    def samples(self) -> Iterator[Sample]:
        self._hashes = array("Q")
        for container in self._containers:
            for entry in iter_entries(self.root, container):
                key = make_key(entry.basename)
                if entry.rejection_reason is None:
                    self._hashes.append(hash_value(key.encode()))
                yield Sample(key, entry.location, -1, entry.rejection_reason)

    def notes(self) -> list[str]:
        hashes = np.unique(np.asarray(self._hashes, np.uint64))
        counts = []
        for name, tables in self._tables.items():
            matched = np.zeros(len(hashes), bool)
            for table in tables:
                in_table = table.contains(hashes)
                _check_matches(table, int(in_table.sum()), len(hashes))
                matched |= in_table
            counts.append(f"{int(matched.sum()):,} {name}")
        notes = [f"metadata of {len(hashes):,} images: {', '.join(counts)}"]
        skipped = [table for tables in self._tables.values() for table in tables if table.skipped]
        notes += [f"{table.path}: rows left out: {table.describe_skipped()}" for table in skipped]
        return notes + [f"{path}: not used; it is no table of attribution, boxes or labels" for path in self._unused]

    def details(self, key: str) -> Details:
        metadata: dict = {"image_id": key}
        rotation, unreadable = 0, []
        for row in self._rows("attribution", key):
            metadata |= {name: row[column] for name, column in _ATTRIBUTION.items() if row.get(column)}
            try:
                rotation = _parse_degrees(row.get("Rotation", ""), key) or rotation
            except ValueError:
                unreadable.append("rotation")
            if not row:
                unreadable.append("attribution_row")
        if rotation:
            metadata["rotation"] = rotation
        if self._tables["labels"]:
            metadata["labels"] = self._read_labels(key, unreadable)
        if self._tables["boxes"]:
            metadata["boxes"] = self._read_boxes(key, unreadable)
        return Details(metadata, rotation, tuple(unreadable))

    def _rows(self, table: str, key: str) -> Iterator[dict[str, str]]:
        for rows in self._tables[table]:
            yield from rows.rows(key)

    def _read_labels(self, key: str, unreadable: list[str]) -> dict[str, list]:
        labels: dict[str, list] = {"positive": [], "negative": [], "machine": []}
        for row in self._rows("labels", key):
            try:
                confidence, label = _parse_finite(row["Confidence"]), self._label(row)
            except (KeyError, ValueError):
                unreadable.append("label_row")
                continue
            if row["Source"] == "machine":
                labels["machine"].append([*label, confidence])
            else:
                labels["positive" if confidence > 0 else "negative"].append(label)
        return labels

    def _read_boxes(self, key: str, unreadable: list[str]) -> list[dict]:
        boxes = []
        for row in self._rows("boxes", key):
            try:
                box: dict = {"label": self._label(row)} | {side.lower(): _parse_finite(row[side]) for side in _SIDES}
                boxes.append(box | {flag: int(row[flag]) for flag in _BOX_FLAGS if row.get(flag)})
            except (KeyError, ValueError):
                unreadable.append("box_row")
        return boxes

    def _label(self, row: dict[str, str]) -> list[str]:
        return [row["LabelName"], self._names.get(row["LabelName"], "")]

    def _add_csv(self, path: Path, split: str) -> None:
        if "class-descriptions" in path.name:
            names = {row[0]: row[1] for row in read_csv(path) if len(row) == 2 and row[0][:1] == "/"}
            if not names:
                raise UserError(f"{path}: no class descriptions (/m/011k07,Tortoise); download it again")
            self._names |= names
            return
        words = path.name.lower().replace(".", "-").replace("_", "-").split("-")
        if split not in words and not (split == "validation" and "val" in words):
            return
        header = {name.strip() for name in next(read_csv(path), [])}
        for name, (typical, required) in _COLUMNS.items():
            if header & typical:
                if missing := sorted({"ImageID", *required} - header):
                    raise UserError(f"{path}: lacks the columns {', '.join(missing)} of {name}; download it again")
                self._tables[name].append(CsvRows(path, "ImageID"))
                return
        if not header or not all(map(str.isidentifier, header)):
            raise UserError(f"{path}: its first line is no header (ImageID,...); add it, or remove the file from SRC")
        self._unused.append(path)


def _check_matches(table: CsvRows, matches: int, num_images: int) -> None:
    """Raise UserError if hardly any image is in the table."""
    possible = min(num_images, table.count_values())
    if num_images and matches <= _MIN_MATCHES * possible:
        raise UserError(
            f"{table.path}: has {matches:,} of the {num_images:,} images in SRC; its ImageID must be their file names "
            "without ending; repair it, or remove it from SRC"
        )


def _find_containers(root: Path, split: str) -> list[str]:
    """Return the archives below root that hold images of the split; if there are none, its folder."""
    archives = []
    for folder in (".", split, "images", f"images/{split}"):
        if (root / folder).is_dir():
            for name in sorted(os.listdir(root / folder)):
                prefix = name.split(".")[0].split("_")[0]
                if name.endswith(TAR_ENDINGS) and (prefix == split or folder.endswith(split)):
                    archives.append(os.path.normpath(f"{folder}/{name}"))
    return archives or [folder for folder in (split, f"images/{split}") if (root / folder).is_dir()]


def _parse_degrees(text: str, key: str) -> int:
    """Return a rotation in degrees. Raises ValueError if it is no number, UserError if no right angle."""
    degrees = _parse_finite(text or "0")
    if degrees % 90:
        raise UserError(f"image {key}: Rotation is {text}, not 0, 90, 180 or 270 degrees")
    return int(degrees) % 360


def _parse_finite(text: str) -> float:
    """Return a number. Raises ValueError if it is none that JSON can represent."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number
