"""COCO: images as {split}2017.zip or a folder of that name, annotations as their zip or folder.

Invariant: an image without annotations is a sample like any other; its json then has empty lists.

The json of a sample: file_name, coco_url, license ({name, url}), width, height (as annotated), captions
(texts), instances ([{bbox: [x, y, width, height] in pixels, category, category_id, area, iscrowd,
segmentation}]).
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.containers import entries
from data_prep.sources.sample import NO_DETAILS, Details, PlainSource, Sample, key_of

SPLITS = ("train", "val", "test", "unlabeled")
_PUBLISHED = {"train2017": 118_287, "val2017": 5_000, "test2017": 40_670, "unlabeled2017": 123_403}


class CocoSource(PlainSource):
    """split: one of SPLITS, with the year ("train2014") where SRC has several. Raises UserError when SRC has
    no images of it."""

    def __init__(self, root: Path, split: str):
        if not root.is_dir():
            raise UserError(f"SRC {root} is no folder")
        self._container = _images(root, split)
        name = Path(self._container).name.removesuffix(".zip")
        tables = [
            _annotations(root, f"{kind}_{name}.json") for kind in ("instances", "captions", "image_info")
        ]
        self._annotated = any(table is not None for table in tables)
        layout = "zip" if self._container.endswith(".zip") else "folder"
        layout += " with annotations" if self._annotated else " without annotations"
        super().__init__("coco", layout, str(root), expected=_PUBLISHED.get(name))
        self._details = _by_image(tables, root)

    def samples(self) -> Iterator[Sample]:
        for entry in entries(self.root, self._container):
            yield Sample(key_of(entry.base), entry.location, -1, entry.rejection_reason)

    def details(self, key: str) -> Details:
        if not self._annotated:
            return NO_DETAILS
        stored = self._details.get(key)
        return Details(json.loads(stored) if stored else {"captions": [], "instances": []})


def _images(root: Path, split: str) -> str:
    pattern = re.compile(re.escape(split) + ("" if split[-1].isdigit() else "[0-9]{4}") + r"(\.zip)?")
    found = {}
    for folder in (".", "images"):
        if (root / folder).is_dir():
            for path in sorted(
                (root / folder).iterdir(), reverse=True
            ):  # the zip before the folder made of it
                if pattern.fullmatch(path.name):
                    found.setdefault(path.name.removesuffix(".zip"), str(path.relative_to(root)))
    if len(found) > 1:
        raise UserError(f"SRC {root} holds {', '.join(sorted(found))}: say which with --split")
    if not found:
        raise UserError(f"SRC {root} holds no {split} images: expected {split}2017.zip or {split}2017/")
    return next(iter(found.values()))


def _annotations(root: Path, name: str) -> dict[str, Any] | None:
    """One annotation file, from a folder or from any annotations zip below root; None where there is none."""
    try:
        for path in (root / name, root / "annotations" / name):
            if path.is_file():
                return json.loads(path.read_bytes())
        for path in sorted(root.glob("*annotations*.zip")) + sorted(root.glob("image_info*.zip")):
            with zipfile.ZipFile(path) as archive:
                if f"annotations/{name}" in archive.namelist():
                    return json.loads(archive.read(f"annotations/{name}"))
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{root}: {name} can't be read ({error}): download it again") from None
    return None


def _by_image(tables: list[dict[str, Any] | None], root: Path) -> dict[str, bytes]:
    """Key -> the sample's json. Kept as text: parsed, COCO's polygons are ten times as large."""
    images: dict[int, dict[str, Any]] = {}
    try:
        for table in filter(None, tables):
            licenses = {
                entry["id"]: {"name": entry["name"], "url": entry["url"]}
                for entry in table.get("licenses", ())
            }
            categories = {entry["id"]: entry["name"] for entry in table.get("categories", ())}
            for entry in table["images"]:
                images.setdefault(entry["id"], _image(entry, licenses))
            for entry in table.get("annotations", ()):
                if "caption" in entry:
                    images[entry["image_id"]]["captions"].append(entry["caption"])
                elif "bbox" in entry:
                    images[entry["image_id"]]["instances"].append(_instance(entry, categories))
            table.clear()
        return {key_of(image["file_name"]): json.dumps(image).encode() for image in images.values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root}: the annotations are not COCO's (at {error})") from None


def _image(entry: dict[str, Any], licenses: dict) -> dict[str, Any]:
    kept = {name: entry[name] for name in ("file_name", "coco_url", "width", "height") if name in entry}
    return kept | {"license": licenses.get(entry.get("license")), "captions": [], "instances": []}


def _instance(entry: dict[str, Any], categories: dict) -> dict[str, Any]:
    kept = {
        name: entry[name]
        for name in ("bbox", "category_id", "area", "iscrowd", "segmentation")
        if name in entry
    }
    return kept | {"category": categories.get(entry["category_id"])}
