"""Source: OpenImages V4 to V7. Image folders or archives by split, and metadata CSVs anywhere below SRC.

Invariant: attribution is kept; each sample's json has the image's license, author and source. The CSVs are
recognized by their columns, and belong to a split by their name.

The json of a sample, each part only if SRC has its CSV:
    image_id; license, author, author_profile_url, title, original_url, landing_url; rotation (degrees
    counter-clockwise, applied to the pixels); labels: {positive, negative: [[id, name]] verified by people,
    machine: [[id, name, confidence]]}; boxes: [{label: [id, name], xmin, xmax, ymin, ymax (as in the CSV:
    0 to 1 of the image before `rotation`), and the CSV's flags, -1 for unknown}]
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.containers import TAR_ENDINGS, iter_entries
from data_prep.sources.csv_rows import CsvRows
from data_prep.sources.sample import Details, Sample, Source, make_key

_ATTRIBUTION = {
    "license": "License",
    "author": "Author",
    "author_profile_url": "AuthorProfileURL",
    "title": "Title",
    "original_url": "OriginalURL",
    "landing_url": "OriginalLandingURL",
}
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
        self._images: list[CsvRows] = []
        self._labels: list[CsvRows] = []
        self._boxes: list[CsvRows] = []
        for path in sorted(root.rglob("*.csv")):
            self._add_csv(path, split)

    def samples(self) -> Iterator[Sample]:
        for container in self._containers:
            for entry in iter_entries(self.root, container):
                yield Sample(make_key(entry.basename), entry.location, -1, entry.rejection_reason)

    def details(self, key: str) -> Details:
        metadata: dict = {"image_id": key}
        rotation = 0
        for row in (row for table in self._images for row in table.rows(key)):
            metadata |= {name: row[column] for name, column in _ATTRIBUTION.items() if row.get(column)}
            rotation = _parse_degrees(row.get("Rotation", ""), key) or rotation
        if rotation:
            metadata["rotation"] = rotation
        if self._labels:
            metadata["labels"] = self._read_labels(key)
        if self._boxes:
            metadata["boxes"] = [self._box(row) for table in self._boxes for row in table.rows(key)]
        return Details(metadata, rotation)

    def _read_labels(self, key: str) -> dict[str, list]:
        labels: dict[str, list] = {"positive": [], "negative": [], "machine": []}
        for row in (row for table in self._labels for row in table.rows(key)):
            confidence = float(row["Confidence"])
            if row["Source"] == "machine":
                labels["machine"].append([*self._label(row), confidence])
            else:
                labels["positive" if confidence > 0 else "negative"].append(self._label(row))
        return labels

    def _box(self, row: dict[str, str]) -> dict:
        box: dict = {"label": self._label(row)}
        box |= {side.lower(): float(row[side]) for side in ("XMin", "XMax", "YMin", "YMax")}
        return box | {flag: int(row[flag]) for flag in _BOX_FLAGS if row.get(flag)}

    def _label(self, row: dict[str, str]) -> list[str]:
        return [row["LabelName"], self._names.get(row["LabelName"], "")]

    def _add_csv(self, path: Path, split: str) -> None:
        if "class-descriptions" in path.name:
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                self._names |= {row[0]: row[1] for row in csv.reader(file) if len(row) == 2 and row[0][:1] == "/"}
            return
        words = path.name.lower().replace(".", "-").replace("_", "-").split("-")
        if split not in words and not (split == "validation" and "val" in words):
            return
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            columns = file.readline().strip().split(",")
        if "OriginalURL" in columns:
            self._images.append(CsvRows(path, "ImageID"))
        elif "XMin" in columns and "LabelName" in columns:
            self._boxes.append(CsvRows(path, "ImageID"))
        elif columns[:4] == ["ImageID", "Source", "LabelName", "Confidence"]:
            self._labels.append(CsvRows(path, "ImageID"))


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
    try:
        degrees = float(text or 0)
    except ValueError:
        return 0
    if degrees % 90:
        raise UserError(f"image {key}: Rotation is {text}, not 0, 90, 180 or 270 degrees")
    return int(degrees) % 360
