"""Instances of a sample: the json of `data_prep coco`, checked; and their masks on a canvas.

Invariant: an instance is used or skipped for a reason that is counted; the same instances are used for training and
as ground truth. Crowd regions are not trained on, as in detectron2, and the evaluation treats them as COCO does.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask

from pipeline.data.placement import Placement

UNLISTED_BYTES = 64
"""Upper bound of the size of an unlisted image's json."""
coco_mask: Any = mask  # its functions are typed too loosely or too strictly


class Instance(NamedTuple):
    """One annotated object, or a region with a crowd of them. Coordinates are in pixels of the stored image."""

    box: tuple[float, float, float, float]
    """x, y, width and height, as published."""
    category_id: int
    """COCO's id."""
    area: float
    is_crowd: bool
    polygons: tuple[np.ndarray, ...]
    """Each (n, 2), x and y, n >= 3; empty if there is a run-length encoding."""
    rle: dict[str, Any] | None
    """COCO's compressed run-length encoding of the whole image."""


class Annotation(NamedTuple):
    """The content of a sample's json."""

    image_id: int
    size: tuple[int, int]
    """Width and height of the image."""
    instances: list[Instance]
    skipped: Counter[str]
    """Number of instances that cannot be used, by reason."""


def is_unlisted(data: np.ndarray) -> bool:
    """Return whether a sample's json is that of an image which the annotation file does not list.

    Raises:
        ValueError: If it is no json.
    """
    return data.size <= UNLISTED_BYTES and json.loads(bytes(data)) == {"captions": [], "instances": []}


def parse_annotation(data: np.ndarray | bytes, image_size: tuple[int, int] | None = None) -> Annotation:
    """Parse the json of a sample.

    Args:
        data: Content of the file.
        image_size: Width and height of the stored image, if known.

    Raises:
        ValueError: If it is no such json, or belongs to an image of another size.
    """
    try:
        tree = json.loads(bytes(data))
        size = int(tree["width"]), int(tree["height"])
        image_id, entries = int(tree["image_id"]), list(tree["instances"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its json is not that of `data_prep coco` ({error!r})") from error
    if image_size not in (None, size):
        raise ValueError("its image has {} x {} px, its json says {} x {}".format(*image_size, *size))
    instances, skipped = [], Counter()
    for entry in entries:
        try:
            instances.append(_parse_instance(entry, size))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            skipped[str(error) if type(error) is ValueError else "damaged"] += 1
    return Annotation(image_id, size, instances, skipped)


def draw_mask(instance: Instance, placement: Placement) -> np.ndarray:
    """Draw an instance on the canvas of a placement: uint8 (H, W), 0 or 1."""
    width, height = placement.canvas
    if instance.polygons:
        polygons = [placement.map_points(points).ravel().tolist() for points in instance.polygons]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    stored = coco_mask.decode(instance.rle)
    mask = np.zeros((height, width), np.uint8)
    # Nearest neighbor, of the pixel centers that the image covers.
    columns, rows = (
        np.minimum((np.arange(start, start + extent) + 0.5) * old / new, old - 1).astype(np.int64)
        for start, extent, old, new in zip(
            placement.corner, placement.extent, placement.stored, placement.size, strict=True
        )
    )
    if placement.flip:
        columns = placement.stored[0] - 1 - columns
    mask[: len(rows), : len(columns)] = stored[np.ix_(rows, columns)]
    return mask


def place_instance(instance: Instance, placement: Placement) -> tuple[np.ndarray, np.ndarray] | None:
    """Return box (x1, y1, x2, y2) and mask of an instance on the canvas; None if nothing of it is visible.

    The box is that of the polygons; of an instance that the canvas cuts off, or with a run-length encoding, it is the
    box of the mask.
    """
    mask = draw_mask(instance, placement)
    if not mask.any():
        return None
    if instance.polygons:
        points = np.concatenate([placement.map_points(points) for points in instance.polygons])
        low, high = points.min(axis=0), points.max(axis=0)
        if (low >= 0).all() and (high <= placement.extent).all():
            return np.concatenate([low, high]), mask
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64), mask


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's compressed run-length encoding of a mask, uint8 (H, W), as json."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def _parse_instance(entry: dict[str, Any], size: tuple[int, int]) -> Instance:
    """Check one entry. Raises ValueError with the reason for which it cannot be used."""
    x, y, width, height = (float(value) for value in entry["bbox"])
    visible = min(x + width, size[0]) > max(x, 0) and min(y + height, size[1]) > max(y, 0)
    if not (np.isfinite([x, y, width, height]).all() and width > 0 and height > 0 and visible):
        raise ValueError("empty box")
    segmentation, polygons, rle = entry.get("segmentation"), (), None
    if segmentation is None:
        raise ValueError("no segmentation")
    if isinstance(segmentation, dict):
        rle = _compress(segmentation, size)
    else:
        polygons = _parse_polygons(segmentation)
    area = float(entry.get("area", width * height))
    return Instance(
        (x, y, width, height), int(entry["category_id"]), area, bool(entry.get("iscrowd", 0)), polygons, rle
    )


def _parse_polygons(segmentation: Sequence[Sequence[float]]) -> tuple[np.ndarray, ...]:
    """Return the usable polygons: as in detectron2, those of fewer than three points are left out."""
    polygons = []
    for flat in segmentation:
        if len(flat) >= 6 and len(flat) % 2 == 0:
            points = np.array(flat, np.float64).reshape(-1, 2)
            if np.isfinite(points).all():
                polygons.append(points)
    if not polygons:
        raise ValueError("no polygon of three points")
    return tuple(polygons)


def _compress(rle: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return a run-length encoding in COCO's compressed form."""
    width, height = size
    if list(rle["size"]) != [height, width]:
        raise ValueError("run-length encoding of another size")
    if isinstance(rle["counts"], list):
        if sum(rle["counts"]) != width * height or min(rle["counts"]) < 0:
            raise ValueError("run-length encoding of another size")
        return coco_mask.frPyObjects(rle, height, width)
    compressed = {"size": [height, width], "counts": rle["counts"]}
    try:
        coco_mask.decode(compressed)
    except ValueError as error:
        raise ValueError("run-length encoding of another size") from error
    return compressed
