"""Instances on a canvas: box, mask and pixels move together; unusable instances are counted."""

import json

import numpy as np
import pytest
import torch
from coco_data import star
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.stats import ks_2samp

from pipeline.data.dali import placed_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.data.instances import Instance, coco_mask, draw_mask, parse_annotation, place_instance
from pipeline.data.large_scale_jitter import fit, jitter
from pipeline.data.placement import Placement
from pipeline.recipe.sections import DataSection

SIDE = 512
PLAIN = DataSection(image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))


def instance_of(polygon, **changes):
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return Instance((*low, *(high - low)), 1, 1.0, False, (polygon,), None)._replace(**changes)


def iou(one, other):
    return (one & other).sum() / max((one | other).sum(), 1)


def box_iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    inside = np.prod(np.maximum(high - low, 0))
    return inside / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - inside)


def box_of(mask):
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


jitters = st.builds(
    jitter,
    st.integers(0, 2**32),
    st.integers(0, 5),
    st.integers(0, 2**20),
    st.tuples(st.integers(200, 900), st.integers(200, 900)),
    st.just(SIDE),
    st.just((0.1, 2.0)),
)
relative_stars = st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.floats(0.1, 0.45), st.floats(0, 6))


def star_in(stored, relative):
    x, y, radius, turn = relative
    polygon = star(np.array([x, y]) * stored, radius * min(stored), turn=turn)
    return np.clip(polygon, 0, stored)


@settings(max_examples=60, deadline=None)
@given(jitters, relative_stars)
def test_box_and_mask_stay_consistent(placement, relative):
    x, y, radius, _ = relative
    disc = star(np.array([x, y]) * placement.stored, radius * min(placement.stored), points=40, depth=1.0)
    placed = place_instance(instance_of(np.clip(disc, 0, placement.stored)), placement)
    if placed is None:
        return
    box, mask = placed
    assert mask.shape == (SIDE, SIDE) and (box[:2] >= 0).all() and (box[2:] <= placement.extent).all()
    tolerance = 1 / min(box[2:] - box[:2])  # half a pixel on each side
    assert box_iou(box, box_of(mask)) > min(0.98, 1 - 2.5 * tolerance)


@settings(max_examples=40, deadline=None)
@given(jitters, relative_stars)
def test_polygon_and_run_length_encoding_land_at_the_same_place(placement, relative):
    width, height = placement.stored
    polygon = star_in(placement.stored, relative)
    rle = coco_mask.merge(coco_mask.frPyObjects([polygon.ravel().tolist()], height, width))
    drawn = draw_mask(instance_of(polygon), placement).astype(bool)
    mapped = draw_mask(instance_of(polygon, polygons=(), rle=rle), placement).astype(bool)
    right, bottom = placement.extent
    assert not drawn[bottom:].any() and not drawn[:, right:].any()
    perimeter = np.abs(np.diff(drawn.astype(int), axis=0)).sum() + np.abs(np.diff(drawn.astype(int), axis=1)).sum()
    pixel = max(1, placement.size[0] / width)  # of the stored image, on the canvas
    assert (drawn ^ mapped).sum() <= 0.75 * pixel * perimeter + 4


@settings(max_examples=25, deadline=None)
@given(jitters, relative_stars)
def test_a_painted_instance_lands_where_its_polygon_lands(placement, relative):
    polygon = star_in(placement.stored, relative)
    image = Image.new("RGB", placement.stored)
    ImageDraw.Draw(image).polygon([tuple(point - 0.5) for point in polygon], fill="white")
    inputs = ([np.empty(0)], *([np.array(value)] for value in (
        placement.flip, placement.size[::-1], placement.corner, placement.extent, (SIDE, SIDE))))  # fmt: skip
    out = torch.empty(3, SIDE, SIDE)
    placed_pipeline_def(PLAIN, DecodeOptions()).postprocess(inputs, 0, torch.from_numpy(np.array(image)), out)
    painted, mask = out[0].numpy() > 0.5, draw_mask(instance_of(polygon), placement).astype(bool)
    perimeter = np.abs(np.diff(mask.astype(int), axis=0)).sum() + np.abs(np.diff(mask.astype(int), axis=1)).sum()
    pixel = max(1, placement.size[0] / placement.stored[0])
    assert (painted ^ mask).sum() <= 0.75 * pixel * perimeter + 4
    right, bottom = placement.extent
    assert not out[:, bottom:].any() and not out[:, :, right:].any()


def test_points_are_mapped_to_the_canvas_and_back():
    placement = Placement((100, 50), (200, 100), (20, 10), (150, 80), flip=True)
    assert placement.extent == (150, 80)
    assert placement.map_points(np.array([[0, 0], [100, 50]])).tolist() == [[180, -10], [-20, 90]]
    assert placement.map_boxes(np.array([[0, 0, 10, 5]])).tolist() == [[160, -10, 180, 0]]
    straight = fit((333, 500), 128)
    boxes = np.array([[10.0, 20.0, 30.0, 45.0]])
    assert np.allclose(straight.unmap_boxes(straight.map_boxes(boxes)), boxes) and max(straight.size) == 128


def plain_jitter(random, stored, low=0.1, high=2.0):
    """detectron2's RandomFlip, ResizeScale and FixedSizeCrop, one image after the other."""
    flip = random.random() < 0.5
    factor = random.uniform(low, high) * SIDE / max(stored)
    size = [round(length * factor) for length in stored]
    share = random.random()
    return [*size, *(round(max(0, length - SIDE) * share) for length in size), flip]


@pytest.mark.parametrize("stored", [(640, 480), (375, 500), (1200, 200)])
def test_jitter_has_detectron2s_distribution(stored):
    random = np.random.default_rng(0)
    theirs = np.array([plain_jitter(random, stored) for _ in range(3000)], float)
    placements = [jitter(7, 0, sample, stored, SIDE, (0.1, 2.0)) for sample in range(3000)]
    ours = np.array([[*p.size, *p.corner, p.flip] for p in placements], float)
    assert min(ks_2samp(one, other).pvalue for one, other in zip(ours.T, theirs.T, strict=True)) > 1e-3
    assert jitter(7, 1, 5, stored, SIDE, (0.1, 2.0)) != placements[5] == jitter(7, 0, 5, stored, SIDE, (0.1, 2.0))
    mistaken = np.array([plain_jitter(random, stored, low=0.2) for _ in range(3000)], float)
    assert ks_2samp(ours[:, 0], mistaken[:, 0]).pvalue < 1e-3


GOOD = {"bbox": [10, 10, 20, 20], "category_id": 3, "area": 400, "iscrowd": 0}
GOOD |= {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
CROWD = {**GOOD, "iscrowd": 1, "segmentation": {"size": [60, 80], "counts": [0, 100, 4700]}}


def encoded(*instances, **changes):
    tree = {"image_id": 7, "width": 80, "height": 60, "instances": list(instances), **changes}
    return np.frombuffer(json.dumps(tree).encode(), np.uint8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [10, 10, 0, 20]}, "empty box"),
        ({"bbox": [10, 10, 20, -1]}, "empty box"),
        ({"bbox": [100, 10, 20, 20]}, "empty box"),
        ({"bbox": [10, 10, 20]}, None),
        ({"segmentation": [[10, 10, 30, 30]]}, "no polygon of three points"),
        ({"segmentation": []}, "no polygon of three points"),
        ({"segmentation": {"size": [80, 60], "counts": [0, 100, 4700]}}, "run-length encoding of another size"),
        ({"segmentation": {"size": [60, 80], "counts": [0, 100]}}, "run-length encoding of another size"),
        ({"segmentation": None}, "no segmentation"),
        ({"category_id": None}, "damaged"),
    ],
)
def test_unusable_instances_are_skipped_and_counted(change, reason):
    annotation = parse_annotation(encoded(GOOD, {**GOOD, **change}, CROWD), (80, 60))
    assert len(annotation.instances) == 2 and annotation.skipped.total() == 1
    assert reason is None or annotation.skipped[reason] == 1
    assert annotation.instances[1].is_crowd and annotation.image_id == 7


def test_iscrowd_and_area_may_be_missing():
    plain = {name: value for name, value in GOOD.items() if name not in ("iscrowd", "area")}
    (instance,) = parse_annotation(encoded(plain)).instances
    assert not instance.is_crowd and instance.area == 400


def test_polygons_of_two_points_do_not_spoil_the_others():
    (instance,) = parse_annotation(encoded({**GOOD, "segmentation": [[1, 1, 2, 2], *GOOD["segmentation"]]})).instances
    assert len(instance.polygons) == 1


@pytest.mark.parametrize(
    ("data", "size"),
    [(encoded(GOOD), (81, 60)), (encoded(GOOD, width="wide"), None), (encoded(image_id=None), None),
     (np.frombuffer(b"{", np.uint8), None), (np.frombuffer(b"[]", np.uint8), None)],
)  # fmt: skip
def test_damaged_annotations_and_other_sizes_are_errors(data, size):
    with pytest.raises(ValueError, match="json"):
        parse_annotation(data, size)
