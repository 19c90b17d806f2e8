"""Small archives in the layouts in which the data sets are published."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

WNIDS = ("n01440764", "n02077923", "n07583066")
WORDS = ("tench, Tinca tinca", "sea lion", "guacamole")
VAL_IDS = (3, 1, 2)
"""ILSVRC2012_ID of WNIDS, in another order than the sorted wnids, as in the real devkit."""


def tar_of(files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w") -> bytes:
    """Return a tar of files, followed by members without data (links, devices)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member)
    return buffer.getvalue()


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def devkit(truth: list[int]) -> bytes:
    """Return ILSVRC2012_devkit_t12.tar.gz; its meta.mat is a MATLAB struct array with an inner node."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(i, wnid, words, 0) for i, wnid, words in zip(VAL_IDS, WNIDS, WORDS, strict=True)]
    synsets = np.array([*rows, (1001, "n00001740", "entity", 3)], dtype=kind)[:, None]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    top = "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{number}\n" for number in truth).encode()
    files = {f"{top}/meta.mat": buffer.getvalue(), f"{top}/ILSVRC2012_validation_ground_truth.txt": lines}
    return tar_of(files, mode="w:gz")


def csv_of(columns: str, rows: list[tuple]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns.split(","))
    writer.writerows(rows)
    return buffer.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def coco_annotations(names: list[str]) -> dict[str, bytes]:
    """Return instances and captions for all but the last image, with gaps in the category ids."""
    license_ = {"id": 3, "name": "Attribution", "url": "http://creativecommons.org/licenses/by/2.0/"}
    image = {"width": 160, "height": 190, "license": 3}
    images = [
        {"id": 100 + i, "file_name": name, **image, "coco_url": f"http://coco/{name}"} for i, name in enumerate(names)
    ]
    box = {"category_id": 90, "bbox": [1.0, 2.0, 30.5, 40.0], "area": 9.0, "iscrowd": 0}
    box |= {"segmentation": [[1, 2, 3, 4, 5, 6]]}
    boxes = [{"id": i, "image_id": 100 + i, **box} for i in range(len(names) - 1)]
    captions = [{"id": i, "image_id": 100 + i, "caption": f"photograph {i}"} for i in range(len(names) - 1)]
    shared = {"images": images, "licenses": [license_]}
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    tables = {
        "instances": {**shared, "annotations": boxes, "categories": categories},
        "captions": {**shared, "annotations": captions},
    }
    return {f"annotations/{kind}_val2017.json": json.dumps(table).encode() for kind, table in tables.items()}
