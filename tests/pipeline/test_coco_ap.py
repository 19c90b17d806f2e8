"""COCO's average precision: pycocotools' figures, with crowds, empty images and missing sizes."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from coco_data import CATEGORIES, read_instances, star
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.instances import Annotation, Instance, coco_mask, encode_mask
from pipeline.evals.coco_ap import NAMES, average_precision, ground_truth


def published():
    """The validation images of COCO_DIR, with two that have no instances."""
    tree = read_instances(Path(os.environ["COCO_DIR"]))
    entries = defaultdict(list)
    for entry in tree["annotations"]:
        entries[entry["image_id"]].append(entry)
    annotations = []
    for number, image in enumerate(tree["images"]):
        size = image["width"], image["height"]
        instances = [read(entry, size) for entry in entries[image["id"]]] if number > 1 else []
        annotations.append(Annotation(image["id"], size, instances, None))
    return annotations, tree["categories"]


def read(entry, size):
    polygons, rle = (), None
    if isinstance(entry["segmentation"], dict):
        rle = coco_mask.frPyObjects(entry["segmentation"], size[1], size[0])
    else:
        polygons = tuple(np.array(flat).reshape(-1, 2) for flat in entry["segmentation"])
    box = tuple(entry["bbox"])
    return Instance(box, entry["category_id"], entry["area"], bool(entry["iscrowd"]), polygons, rle)


def painted():
    """Images with stars, one of them a crowd, and one image without instances."""
    random, annotations = np.random.default_rng(0), []
    for image_id in range(20):
        instances = []
        for number in range(int(random.integers(1, 6)) if image_id else 0):
            polygon = star(random.uniform(40, 160, 2), random.uniform(5, 38))
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            category = CATEGORIES[int(random.integers(3))]["id"]
            box = (*low.tolist(), *(high - low).tolist())
            area = float(np.prod(high - low) / 2)
            instances.append(Instance(box, category, area, number == 3, (polygon,), None))
        annotations.append(Annotation(image_id, (200, 200), instances, None))
    return annotations, CATEGORIES


def noisy_detections(annotations, categories):
    """Detections near the ground truth, also of crowds, some of a wrong class, some twice, some missing."""
    random, rows = np.random.default_rng(1), []
    ids = [category["id"] for category in categories]
    for annotation in annotations:
        width, height = annotation.size
        for instance in [*annotation.instances, *annotation.instances[:2]]:
            if random.random() < 0.15:
                continue
            x, y, w, h = np.array(instance.box) + random.normal(0, 0.06, 4) * np.array(instance.box)[[2, 3, 2, 3]]
            x1, y1 = max(0, int(x)), max(0, int(y))
            mask = np.zeros((height, width), np.uint8)
            mask[y1 : max(y1 + 1, int(y + h)), x1 : max(x1 + 1, int(x + w))] = 1
            if random.random() < 0.7 and instance.polygons:
                flat = [(points + random.normal(0, 1, 2)).ravel().tolist() for points in instance.polygons]
                mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))
            category = instance.category_id if random.random() < 0.9 else int(random.choice(ids))
            row = {"image_id": annotation.image_id, "category_id": category, "score": round(random.random(), 2)}
            rows.append(row | {"bbox": [float(x), float(y), float(w), float(h)], "segmentation": encode_mask(mask)})
    return rows


def pycocotools_figures(truth, detections):
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    figures = {}
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        evaluation = COCOeval(coco, coco.loadRes(detections), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        figures |= {f"{kind}_{name}": value for name, value in zip(NAMES, evaluation.stats, strict=False)}
    return figures


@pytest.mark.parametrize("source", [painted, published])
def test_figures_are_pycocotools(source):
    if source is published and "COCO_DIR" not in os.environ:
        pytest.skip("needs COCO_DIR")
    annotations, categories = source()
    assert any(instance.is_crowd for annotation in annotations for instance in annotation.instances)
    truth = ground_truth(annotations, [c["name"] for c in categories], [c["id"] for c in categories])
    detections = noisy_detections(annotations, categories)
    ours, theirs = average_precision(truth, detections), pycocotools_figures(truth, detections)
    assert 0.1 < ours["box_ap"] < 0.9 and 0.05 < ours["mask_ap"] < 0.9
    for name, value in ours.items():
        assert (value is None and theirs[name] == -1) or value == pytest.approx(theirs[name], abs=1e-6), name


def test_perfect_detections_have_precision_1_and_none_have_0():
    annotations, categories = painted()
    truth = ground_truth(annotations, [c["name"] for c in categories], [c["id"] for c in categories])
    rows = []
    for annotation in annotations:
        for instance in annotation.instances:
            flat = [points.ravel().tolist() for points in instance.polygons]
            rle = coco_mask.merge(coco_mask.frPyObjects(flat, *annotation.size[::-1]))
            row = {"image_id": annotation.image_id, "category_id": instance.category_id, "score": 0.9}
            rows.append(row | {"bbox": list(instance.box), "segmentation": encode_mask(coco_mask.decode(rle))})
    perfect, none = average_precision(truth, rows), average_precision(truth, [])
    assert perfect["box_ap"] == pytest.approx(1) and perfect["mask_ap"] == pytest.approx(1)
    assert perfect["box_ap_large"] is None and none["box_ap_large"] is None  # no star is larger than 96 x 96 px
    assert {none["box_ap"], none["mask_ap"], none["mask_ap_small"]} == {0.0}
