"""Source: COCO. Images as {split}2017.zip or a folder of that name, annotations as their zip or folder.

Invariant: an image without annotations is a sample like any other; its json has empty lists. Annotations belong to the
image with the base name of their file_name; if several image ids have it, to the same image.

The json of a sample: image_id, file_name, coco_url, license ({name, url}), width, height (as annotated), captions
(texts), instances ([{id, bbox: [x, y, width, height] in pixels, category, category_id, area, iscrowd, segmentation:
polygons or RLE}]), all as published. If there are instances, the classes of the set are the categories, in the order
of their ids.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError
from data_prep.sources.containers import iter_entries
from data_prep.sources.sample import Classes, Details, Sample, Source, make_key

_PUBLISHED = {"train2017": 118_287, "val2017": 5_000, "test2017": 40_670, "unlabeled2017": 123_403}
_IMAGE_FIELDS = ("file_name", "coco_url", "width", "height")
_INSTANCE_FIELDS = ("id", "bbox", "category_id", "area", "iscrowd", "segmentation")


class Annotations(NamedTuple):
    """The annotations of a split."""

    details: dict[str, bytes]
    """The json of each key. Parsed, COCO's polygons would take ten times the memory."""
    annotated: set[str]
    """Keys with a caption or an instance."""
    repeated: int
    """Number of keys with several image ids."""


class CocoSource(Source):
    """COCO 2014 or 2017, detection and captions.

    Args:
        root: Folder with the downloaded zips or their content.
        split: "train", "val", "test" or "unlabeled", with the year ("train2014") if SRC has several.
    """

    def __init__(self, root: Path, split: str):
        if not root.is_dir():
            raise UserError(f"SRC {root}: not a folder")
        self._container = _find_images(root, split)
        name = Path(self._container).name.removesuffix(".zip")
        tables = [_read_annotations(root, f"{kind}_{name}.json") for kind in ("instances", "captions", "image_info")]
        self._annotated = any(table is not None for table in tables)
        layout = "zip" if self._container.endswith(".zip") else "folder"
        layout += " with annotations" if self._annotated else " without annotations"
        classes = _read_classes(tables[0], root)
        super().__init__("coco", layout, str(root), classes, expected=_PUBLISHED.get(name))
        self._annotations = _group_by_image(tables, root)
        self._keys: set[str] = set()

    def samples(self) -> Iterator[Sample]:
        self._keys.clear()
        for entry in iter_entries(self.root, self._container):
            key = make_key(entry.basename)
            if entry.rejection_reason is None:
                self._keys.add(key)
            yield Sample(key, entry.location, -1, entry.rejection_reason)

    def notes(self) -> list[str]:
        if not self._annotated:
            return []
        details, annotated, repeated = self._annotations
        listed = len(self._keys & details.keys())
        if self._keys and not listed:
            raise UserError(
                f"SRC {self.root}: the annotation files list no image of {self._container}, but "
                f"{next(iter(details), 'none')}, ...; use those of the same split, or remove them"
            )
        counts = f"{listed:,} of {len(self._keys):,} images, {len(self._keys & annotated):,} of them with annotations"
        notes = [f"annotation files: they list {counts}"]
        if repeated:
            notes.append(f"file names with several image ids, whose annotations are joined: {repeated:,}")
        return notes

    def details(self, key: str) -> Details:
        if not self._annotated:
            return Details()
        stored = self._annotations.details.get(key)
        return Details(json.loads(stored) if stored else {"captions": [], "instances": []})


def _find_images(root: Path, split: str) -> str:
    pattern = re.compile(re.escape(split) + ("" if split[-1].isdigit() else "[0-9]{4}") + r"(\.zip)?")
    containers = {}
    for folder in (root, root / "images"):
        # In reverse order a zip comes before the folder that was unpacked from it.
        for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
            if pattern.fullmatch(path.name):
                containers.setdefault(path.name.removesuffix(".zip"), str(path.relative_to(root)))
    if len(containers) > 1:
        raise UserError(f"SRC {root}: has {', '.join(sorted(containers))}; choose one with --split")
    if not containers:
        raise UserError(f"SRC {root}: no {split} images; expected {split}2017.zip or {split}2017/")
    return next(iter(containers.values()))


def _read_annotations(root: Path, name: str) -> dict[str, Any] | None:
    """Read an annotation file from a folder or an annotations zip below root; None if there is none."""
    try:
        for path in (root / name, root / "annotations" / name):
            if path.is_file():
                return json.loads(path.read_bytes())
        for path in sorted(root.glob("*annotations*.zip")) + sorted(root.glob("image_info*.zip")):
            with zipfile.ZipFile(path) as archive:
                if f"annotations/{name}" in archive.namelist():
                    return json.loads(archive.read(f"annotations/{name}"))
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"SRC {root}: {name} cannot be read ({error}); download it again") from error
    return None


def _read_classes(table: dict[str, Any] | None, root: Path) -> Classes:
    """Return the categories of the instances. Raises UserError if they are damaged or have an id twice."""
    try:
        pairs = sorted((int(entry["id"]), str(entry["name"])) for entry in (table or {}).get("categories", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"SRC {root}: not COCO's annotation format (at categories: {error})") from error
    ids, names = tuple(number for number, _ in pairs), tuple(name for _, name in pairs)
    if len(set(ids)) < len(ids):
        raise UserError(f"SRC {root}: two categories have the same id; repair the annotations")
    return Classes(names, annotation="instances", category_ids=ids) if names else Classes()


def _group_by_image(tables: list[dict[str, Any] | None], root: Path) -> Annotations:
    images: dict[int, dict[str, Any]] = {}
    try:
        for table in filter(None, tables):
            licenses = {
                entry["id"]: {"name": entry["name"], "url": entry["url"]} for entry in table.get("licenses", ())
            }
            categories = {entry["id"]: entry["name"] for entry in table.get("categories", ())}
            for entry in table["images"]:
                image = {name: entry[name] for name in _IMAGE_FIELDS if name in entry}
                image |= {"image_id": entry["id"], "license": licenses.get(entry.get("license"))}
                image |= {"captions": [], "instances": []}
                images.setdefault(entry["id"], image)
            for entry in table.get("annotations", ()):
                if "caption" in entry:
                    images[entry["image_id"]]["captions"].append(entry["caption"])
                elif "bbox" in entry:
                    instance = {name: entry[name] for name in _INSTANCE_FIELDS if name in entry}
                    instance["category"] = categories.get(entry["category_id"])
                    images[entry["image_id"]]["instances"].append(instance)
            table.clear()
        return _join_by_key(images, root)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"SRC {root}: not COCO's annotation format (at {error})") from error


def _join_by_key(images: dict[int, dict[str, Any]], root: Path) -> Annotations:
    """Join the annotations of image ids with the same key. Empties `images`."""
    ids: dict[str, list[int]] = {}
    for number, image in images.items():
        ids.setdefault(make_key(_normalize(image["file_name"]).rpartition("/")[2]), []).append(number)
    joined = Annotations({}, set(), sum(len(numbers) > 1 for numbers in ids.values()))
    for key, (first, *others) in ids.items():
        image = images.pop(first)
        for other in map(images.pop, others):
            names = [f"/{_normalize(name)}" for name in (image["file_name"], other["file_name"])]
            if not names[0].endswith(names[1]) and not names[1].endswith(names[0]):
                raise UserError(
                    f"SRC {root}: the annotation files list {image['file_name']} and {other['file_name']}, which would "
                    "have the same key; give the images different names"
                )
            image["captions"] += other["captions"]
            image["instances"] += other["instances"]
        if image["captions"] or image["instances"]:
            joined.annotated.add(key)
        joined.details[key] = json.dumps(image).encode()
    return joined


def _normalize(file_name: str) -> str:
    return file_name.replace("\\", "/")
