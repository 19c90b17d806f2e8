"""Pictures of semantic segmentation."""

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.canvas import GAP, MARGIN
from pipeline.pictures.segmentation_overlay import MAX_ENTRIES, OPACITY, class_colors, render_segmentation

NAMES = [f"class {number}, also known as a long synonym" for number in range(150)]


def test_colors_of_all_classes_differ():
    colors = class_colors(255).astype(int)
    distances = np.abs(colors[:, None] - colors).sum(2) + 1000 * np.eye(255)
    assert distances.min() >= 32 and colors[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]


@pytest.mark.parametrize(("width", "height"), [(640, 480), (61, 200), (1300, 300)])
def test_the_overlay_has_the_color_of_each_pixels_class(width, height):
    classes = (np.arange(width) * 7 // width)[None].repeat(height, 0) * 20
    picture = render_segmentation(Image.new("RGB", (width, height), (100, 150, 200)), classes, NAMES)
    factor = (picture.width - 2 * MARGIN - GAP) // 2 // width
    left = MARGIN + factor * width + GAP
    overlay = np.asarray(picture.crop((left, MARGIN, left + factor * width, MARGIN + factor * height)), int)
    expected = (1 - OPACITY) * np.array([100, 150, 200]) + OPACITY * class_colors(150)[classes]
    assert np.abs(overlay[factor // 2 :: factor, factor // 2 :: factor] - expected).max() <= 0.5 + 1e-6
    legend = np.asarray(picture)[MARGIN + factor * height + 1 :].reshape(-1, 3)
    for number in np.unique(classes):
        assert (legend == class_colors(150)[number]).all(1).sum() > 50, "a patch in the legend"


def test_the_legend_names_the_largest_classes_and_counts_the_others():
    classes = np.arange(150).repeat(30).reshape(50, 90)
    picture = render_segmentation(Image.new("RGB", (90, 50)), classes, NAMES)
    legend = np.asarray(picture)[MARGIN + 6 * 50 :].reshape(-1, 3)
    colors = class_colors(150)
    shown = [number for number in range(150) if (legend == colors[number]).all(1).sum() > 150]  # the text has grays
    assert shown == list(range(MAX_ENTRIES - 1))
