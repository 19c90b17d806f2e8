"""data.augmentation: MAE's Table 1 (e), against torchvision and plain definitions."""

import shutil

import forkserver
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional

from pipeline.data.augment.color_jitter import NOISE_DIM, jitter_colors
from pipeline.data.fixed_size_crop import center_boxes, draw_fixed_size_boxes
from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.linear_probe import load_probe_recipe

OPERATIONS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
sides = st.integers(1, 3000)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_color_jitter_equals_torchvisions_operations(seed):
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.rand(3, 3, 5, 7, generator=generator), torch.rand(3, NOISE_DIM, generator=generator)
    ours = jitter_colors(images, noise)
    for image, row, jittered in zip(images, noise, ours, strict=True):
        for operation in row[3:].argsort():
            image = OPERATIONS[operation](image, 0.6 + 0.8 * row[operation].item())
        assert torch.allclose(jittered, image, atol=1e-5)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.sampled_from([0.875, 1.0]), st.integers(0, 10**6))
def test_fixed_size_crops_are_squares_of_evaluations_size(sizes, crop_pct, seed):
    epoch, ids = np.zeros(len(sizes), np.int64), np.arange(len(sizes))
    central = center_boxes(np.array(sizes), crop_pct)
    drawn = draw_fixed_size_boxes(seed, epoch, ids, np.array(sizes), crop_pct)
    for (width, height), box, (x, y, w, h) in zip(sizes, central.tolist(), drawn.tolist(), strict=True):
        side = max(1, round(crop_pct * min(width, height)))
        assert box == [(width - side) // 2, (height - side) // 2, side, side]
        assert (w, h) == (side, side) and 0 <= x <= width - side and 0 <= y <= height - side


def test_fixed_size_crops_are_uniform_over_all_positions():
    count = 20_000
    boxes = draw_fixed_size_boxes(1, np.zeros(count, np.int64), np.arange(count), np.full((count, 2), (8, 11)), 0.875)
    assert set(boxes[:, 2]) == {7}
    for axis, positions in ((0, 2), (1, 5)):
        frequency = np.bincount(boxes[:, axis], minlength=positions) / count
        assert len(frequency) == positions and np.abs(frequency - 1 / positions).max() < 0.015
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.03


def load(shards, augmentation: str, ranks: int = 1) -> torch.Tensor:
    """Return the images of steps 0 and 1, the second of another epoch."""
    recipe = load_recipe(
        "demo_emae", [f"data.augmentation={augmentation}", "data.global_batch=96", "engine.micro_batch=24"]
    )
    parts = []
    for rank in range(ranks):
        loader = Loader(ShardReader(shards), recipe, 4, torch.device("cpu"), rank, ranks)
        batches = [loader.next().images.clone() for _ in range(2 * 4 // ranks)]
        loader.close()
        parts.append(torch.cat(batches).unflatten(0, (2, -1)))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("augmentation", ["none", "fixed_size", "color_jitter"])
def test_augmented_images_do_not_depend_on_the_number_of_ranks(shards, augmentation):
    images = load(shards, augmentation)
    assert torch.equal(images, load(shards, augmentation, ranks=2))
    assert not torch.allclose(images, load(shards, "random_size"))


def test_no_augmentation_gives_the_same_images_in_every_epoch(photographs, tmp_path):
    """The set has 96 images, so both steps have all of them, in another order."""
    for path in sorted(path for path in photographs.rglob("*") if path.is_file())[:96]:
        target = tmp_path / "images" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    built = forkserver.run(["-m", "data_prep", "folder", tmp_path / "images", tmp_path / "set", "--shard-size", "20"])
    assert built.returncode == 0, built.stderr
    sizes = ShardReader(tmp_path / "set").shard_sizes
    assert len(sizes) > 1 and sum(sizes) == 96
    first, second = (sorted(step.flatten(1).sum(1).tolist()) for step in load(tmp_path / "set", "none"))
    assert first == second


def test_color_jitter_keeps_crops_and_flips(shards):
    plain, jittered = load(shards, "random_size")[0], load(shards, "color_jitter")[0]
    for image, other in zip(plain[:16].flatten(1), jittered[:16].flatten(1), strict=True):
        assert np.corrcoef(image, other)[0, 1] > 0.8


def test_a_probe_rejects_augmentations():
    with pytest.raises(UserError, match=r"data\.augmentation: is not supported"):
        load_probe_recipe({"probe": {"weights": "pixels"}}, ["data.augmentation=none"])
