"""Pixels and labels that the loaders return belong together."""

import numpy as np
import pytest
import torch
from painted import COLORS

from pipeline.data.dense_loader import DenseEvalLoader, DenseLoader
from pipeline.data.label_maps import IGNORED, RandomScaleCrop, ShorterSideResize
from pipeline.data.reader import ShardReader
from pipeline.recipe.tasks import load_finetune_recipe

SIDE = 48


def nearest_color(images: torch.Tensor, recipe) -> np.ndarray:
    """Return the index of the nearest of COLORS, (B, H, W), of normalized images (B, 3, H, W)."""
    mean, std = (torch.tensor(getattr(recipe.data, name))[:, None, None] for name in ("mean", "std"))
    levels = ((images * std + mean) * 255)[:, None]
    distances = (levels - torch.tensor(COLORS).float()[None, :, :, None, None]).square().sum(2)
    return distances.argmin(1).numpy()


def is_inside(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels whose neighbors up to 3 pixels away have the same label; only there, colors are not mixed."""
    inside = labels != IGNORED
    for shift in (1, 2, 3):
        for axis in (-2, -1):
            for step in (shift, -shift):
                inside &= np.roll(labels, step, axis) == labels
    inside[..., :3, :] = inside[..., -3:, :] = inside[..., :3] = inside[..., -3:] = False
    return inside


@pytest.fixture(scope="module")
def recipe():
    settings = [f"data.image_size={SIDE}", "data.global_batch=5", "engine.micro_batch=5"]
    return load_finetune_recipe("segment_tiny", "random:demo_emae", settings)


def test_painted_images_match_their_labels_after_augmentation(label_map_sets, recipe):
    reader = ShardReader(label_map_sets[0], recipe.data)
    transform = RandomScaleCrop(1, SIDE, (0.5, 2.0), 0.75, True)
    loader = DenseLoader(reader, transform, recipe, 3, torch.device("cpu"))
    checked = 0
    try:
        for _ in range(20):
            batch = loader.next()
            labels = np.stack([target["labels"].numpy() for target in batch.targets])
            inside = is_inside(labels)
            assert (nearest_color(batch.images, recipe)[inside] == labels[inside]).all()
            checked += inside.sum()
            for image, target in zip(batch.images, batch.targets, strict=True):
                width, height = target["extent"].tolist()
                assert not image[:, height:].any() and not image[:, :, width:].any()
    finally:
        loader.close()
    assert checked > 20_000


def test_evaluation_returns_each_image_with_its_labels(label_map_sets, recipe):
    reader = ShardReader(label_map_sets[1], recipe.data)
    loader = DenseEvalLoader(reader, ShorterSideResize(SIDE), recipe.data, 1, torch.device("cpu"))
    sizes = set()
    for batch in loader:
        (image,), labels = batch.images, batch.targets[0]["labels"].numpy()
        height, width = labels.shape
        rows = (np.arange(image.shape[1]) * height) // image.shape[1]
        columns = (np.arange(image.shape[2]) * width) // image.shape[2]
        resized = labels[rows][:, columns]
        inside = is_inside(resized)
        assert (nearest_color(batch.images, recipe)[0][inside] == resized[inside]).all() and inside.any()
        assert min(image.shape[1:]) == SIDE
        sizes.add((width, height))
    assert len(sizes) == 5 and sizes == {(90, 70), (64, 101), (150, 64), (80, 80), (47, 33)}
