"""Images and label maps keep in step through resize, crop, flip and padding; crops have mmsegmentation's law."""

import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp

from pipeline.data.label_maps import (
    IGNORED,
    TRIES,
    RandomScaleCrop,
    ShorterSideResize,
    decode_labels,
    has_variety,
    nearest_indexes,
    rescaled_size,
)

SIDE = 48


def encode(numbers: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(numbers.astype(np.uint8)).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def blocks(width: int, height: int, seed: int, side: int = 24) -> np.ndarray:
    """Return a map of large squares of the numbers 0 to 5."""
    numbers = np.random.default_rng(seed).integers(0, 6, (-(-height // side), -(-width // side)))
    return numbers.repeat(side, 0).repeat(side, 1)[:height, :width]


def transform(seed: int = 0, **options) -> RandomScaleCrop:
    return RandomScaleCrop(
        **{"seed": seed, "side": SIDE, "scale": (0.5, 2.0), "cat_max_ratio": 0.75, "flip": True} | options
    )


@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 10**6), st.integers(0, 50))
@example(48, 48, 0, 1)
@settings(max_examples=60)
def test_a_label_is_that_of_the_stored_pixel_under_its_center(width, height, seed, sample):
    numbers = blocks(width, height, seed % 7)
    placement, target = transform(seed)(encode(numbers), (width, height), 3, sample)
    labels, (covered_w, covered_h) = target["labels"].numpy(), placement.extent
    assert labels.shape == (SIDE, SIDE) and target["extent"].tolist() == [covered_w, covered_h]
    outside = np.ones((SIDE, SIDE), bool)
    outside[:covered_h, :covered_w] = False
    assert (labels[outside] == IGNORED).all()
    x, y = np.meshgrid(np.arange(covered_w), np.arange(covered_h))
    scale = np.array(placement.size) / placement.stored
    stored = (np.stack([x, y], -1) + np.array(placement.corner) + 0.5) / scale
    if placement.flip:
        stored[..., 0] = width - stored[..., 0]
    # A center may lie exactly on the border of stored pixels, in each direction.
    candidates = [
        numbers[
            np.floor(stored[..., 1] + shift_y).astype(int).clip(0, height - 1),
            np.floor(stored[..., 0] + shift_x).astype(int).clip(0, width - 1),
        ]
        for shift_x in (-1e-6, 1e-6)
        for shift_y in (-1e-6, 1e-6)
    ]
    expected = labels[:covered_h, :covered_w].astype(int) + 1
    expected[expected == IGNORED + 1] = 0
    assert np.any([expected == candidate for candidate in candidates], axis=0).all()


@given(st.integers(1, 400), st.integers(1, 400))
def test_nearest_neighbors_are_pillows(stored, resized):
    row = np.arange(stored, dtype=np.int32)[None]
    expected = np.asarray(Image.fromarray(row, "I").resize((resized, 1), Image.Resampling.NEAREST))[0]
    differ = np.flatnonzero(nearest_indexes(stored, resized) != expected)
    assert ((2 * differ + 1) * stored % (2 * resized) == 0).all(), "only centers on the border of two pixels"
    assert nearest_indexes(stored, stored).tolist() == row[0].tolist()


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        ((683, 512), 1.0, (683, 512)),
        ((1000, 750), 1.0, (683, 512)),
        ((400, 300), 0.5, (341, 256)),
        ((300, 3000), 1.0, (205, 2048)),  # the longer side is the limit
        ((640, 480), 2.0, (1365, 1024)),
    ],
)
def test_sizes_are_those_of_mmsegmentation(size, factor, expected):
    assert rescaled_size(size, 512, factor) == expected


def plain_loop(numbers: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """mmsegmentation's RandomCrop: try ten crops, and draw another one after each that has too much of one class."""
    height, width = numbers.shape

    def draw():
        return rng.integers(0, max(height - side, 0) + 1), rng.integers(0, max(width - side, 0) + 1)

    y, x = draw()
    for _ in range(10):
        values, counts = np.unique(numbers[y : y + side, x : x + side], return_counts=True)
        counts = counts[values != 0]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
        y, x = draw()
    return int(y), int(x)


def test_crops_have_the_distribution_of_a_plain_loop():
    numbers = np.ones((96, 120), int)  # varied in one corner only
    numbers[50:, 70:] = blocks(50, 46, 0, 9)
    encoded, draws, rng = encode(numbers), 2000, np.random.default_rng(0)
    crop = transform(scale=(1.0, 1.0), flip=False, side=96)
    small = RandomScaleCrop(0, 96, (2.0, 2.0), 0.75, False)
    ours, labels = [], []
    for sample in range(draws):
        placement, target = small(encoded, (120, 96), 0, sample)
        ours.append(placement.corner[::-1])
        labels.append(has_variety(target["labels"].numpy(), 0.75))
    resized = numbers[nearest_indexes(96, 192)][:, nearest_indexes(120, 240)]
    theirs = [plain_loop(resized, 96, rng) for _ in range(draws)]
    for axis in (0, 1):
        assert ks_2samp([c[axis] for c in ours], [c[axis] for c in theirs]).pvalue > 1e-3
    accepted = [has_variety(np.uint8(resized[y : y + 96, x : x + 96] - 1), 0.75) for y, x in theirs]
    assert abs(np.mean(labels) - np.mean(accepted)) < 0.05 and np.mean(labels) > 0.1
    without = RandomScaleCrop(0, 96, (2.0, 2.0), 1.1, False)
    free = [without(encoded, (120, 96), 0, sample)[0].corner[::-1] for sample in range(draws)]
    assert ks_2samp([c[1] for c in ours], [c[1] for c in free]).pvalue < 1e-6, "the limit has an effect"
    assert crop(encoded, (120, 96), 0, 0)[0].size == (120, 96)


def test_the_eleventh_crop_is_taken_if_no_try_is_varied():
    numbers = np.ones((100, 200), int)
    corners = {transform(side=50)(encode(numbers), (200, 100), 0, sample)[0].corner for sample in range(20)}
    assert len(corners) > 10 and TRIES == 10


@given(st.integers(0, 2**32), st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=20)
def test_a_draw_depends_on_seed_epoch_and_sample_alone(seed, epoch, sample):
    encoded = encode(blocks(90, 70, 1))
    first, second = (transform(seed)(encoded, (90, 70), epoch, sample) for _ in range(2))
    assert first[0] == second[0] and (first[1]["labels"] == second[1]["labels"]).all()


def test_half_of_the_images_are_flipped():
    encoded = encode(blocks(60, 60, 0))
    flips = [transform()(encoded, (60, 60), 0, sample)[0].flip for sample in range(400)]
    assert 0.4 < np.mean(flips) < 0.6
    assert not any(transform(flip=False)(encoded, (60, 60), 0, sample)[0].flip for sample in range(50))


def test_evaluation_keeps_the_stored_label_map():
    numbers = blocks(150, 90, 0)
    placement, target = ShorterSideResize(48)(encode(numbers), (150, 90), 0, 5)
    assert placement.size == placement.extent == (80, 48) and not placement.flip
    assert (target["labels"].numpy() == np.where(numbers == 0, IGNORED, numbers - 1)).all()


@pytest.mark.parametrize("case", ["another size", "RGB", "damaged"])
def test_a_map_that_does_not_belong_to_its_image_is_an_error(case):
    numbers = np.zeros((20, 30, 3), np.uint8) if case == "RGB" else np.ones((20, 31 if case == "another size" else 30))
    encoded = encode(numbers)
    with pytest.raises(ValueError, match="label map"):
        decode_labels(encoded[:-30] if case == "damaged" else encoded, (30, 20))
