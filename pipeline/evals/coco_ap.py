"""COCO's average precision of boxes and masks, computed by faster-coco-eval.

Invariant: the figures are pycocotools' on the same ground truth and detections.
"""

from collections.abc import Sequence
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

from pipeline.data.instances import Annotation, Instance

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first of COCOeval's figures, in its order."""
KINDS: dict[str, Any] = {"box": "bbox", "mask": "segm"}


def ground_truth(annotations: Sequence[Annotation], classes: Sequence[str], category_ids: Sequence[int]) -> dict:
    """Return annotations in the format of COCO's instances_*.json."""
    images, entries = [], []
    for annotation in annotations:
        width, height = annotation.size
        images.append({"id": annotation.image_id, "width": width, "height": height})
        for instance in annotation.instances:
            entry = {"id": len(entries) + 1, "image_id": annotation.image_id, **_as_json(instance)}
            entries.append(entry)
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)]
    return {"images": images, "annotations": entries, "categories": categories}


def average_precision(truth: dict, detections: list[dict]) -> dict[str, float | None]:
    """Return the figures by name, in [0, 1]; None if there is no ground truth of that size.

    Args:
        truth: From `ground_truth`.
        detections: In COCO's results format.
    """
    figures: dict[str, float | None] = {}
    coco_truth = COCO(truth)
    for kind, iou_type in KINDS.items():
        found = coco_truth.loadRes(detections) if detections else COCO({**truth, "annotations": []})
        evaluation = COCOeval_faster(coco_truth, found, iou_type, print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = [float(value) for value in evaluation.stats[: len(NAMES)]]
        figures |= {f"{kind}_{name}": value if value >= 0 else None for name, value in zip(NAMES, values, strict=True)}
    return figures


def _as_json(instance: Instance) -> dict[str, Any]:
    segmentation = instance.rle or [points.ravel().tolist() for points in instance.polygons]
    return {
        "category_id": instance.category_id,
        "bbox": list(instance.box),
        "area": instance.area,
        "iscrowd": int(instance.is_crowd),
        "segmentation": segmentation,
    }
