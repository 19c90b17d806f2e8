"""Small data sets in COCO's layout: a part of COCO_DIR, or painted polygons."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]


def write_coco(root: Path, count: int) -> Path:
    """Write `count` training and validation images with instances, of COCO_DIR if it is set."""
    source = os.environ.get("COCO_DIR")
    for seed, split in enumerate(("train2017", "val2017")):
        if source:
            _copy_part(Path(source), root, split, count)
        else:
            _paint(root, split, count, seed)
    return root


def read_instances(root: Path, split: str = "val2017") -> dict:
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def write_instances(root: Path, tree: dict, split: str = "val2017") -> None:
    path = root / f"annotations/instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def star(center, radius, points=7, turn=0.0, depth=0.6) -> np.ndarray:
    """Return a star-shaped polygon (2 * points, 2); its inner corners are at `depth` of the radius."""
    angles = turn + np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, depth, 1.0) * radius
    return np.array(center) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _copy_part(source: Path, root: Path, split: str, count: int) -> None:
    tree = read_instances(source, split)
    crowded = {entry["image_id"] for entry in tree["annotations"] if entry["iscrowd"]}
    tree["images"].sort(key=lambda image: (image["id"] not in crowded, image["id"]))
    kept = tree["images"] = [*tree["images"][:2], *tree["images"][-(count - 2) :]]
    ids = {image["id"] for image in kept}
    empty = kept[-1]["id"]  # an image without instances
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in ids and a["image_id"] != empty]
    write_instances(root, tree, split)
    (root / split).mkdir()
    for image in kept:
        shutil.copy(source / split / image["file_name"], root / split)


def _paint(root: Path, split: str, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    for number in range(count):
        width, height = int(random.integers(120, 200)), int(random.integers(120, 200))
        picture = Image.fromarray(random.integers(90, 160, (height, width, 3), np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(0 if number == count - 1 else int(random.integers(1, 5))):
            kind = int(random.integers(len(CATEGORIES)))
            polygon = star(random.uniform(40, 90, 2), random.uniform(15, 35), 3 + 2 * kind)
            draw.polygon([tuple(point) for point in polygon], fill=[(220, 40, 40), (40, 220, 40), (40, 40, 220)][kind])
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            annotation = {"id": len(annotations) + 1, "image_id": number + 1, "iscrowd": 0}
            annotation |= {"category_id": CATEGORIES[kind]["id"], "segmentation": [polygon.ravel().tolist()]}
            annotations.append(annotation | {"bbox": [*low, *(high - low)], "area": float(np.prod(high - low) / 2)})
        if number < 2:  # a crowd over the left half
            half = width // 2 * height
            rle = {"size": [height, width], "counts": [0, half, width * height - half]}
            crowd = {"id": len(annotations) + 1, "image_id": number + 1, "iscrowd": 1, "category_id": 1, "area": half}
            annotations.append(crowd | {"segmentation": rle, "bbox": [0, 0, width // 2, height]})
        name = f"{number + 1:012d}.jpg"
        picture.save(root / split / name, quality=95)
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
    write_instances(root, {"images": images, "annotations": annotations, "categories": CATEGORIES}, split)
