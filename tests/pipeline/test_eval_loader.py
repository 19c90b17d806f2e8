"""The evaluation loader: torchvision's pixels, every sample once, with its label."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.eval_loader import EvalLoader, resize_and_crop_geometry
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection

CPU = torch.device("cpu")
PLAIN = DataSection(mean=(0, 0, 0), std=(1, 1, 1))
SMALL = DataSection(image_size=16)


def load_all(shards, batch, world_size=1):
    """Return the batches of each rank."""
    reader = ShardReader(shards)
    return [list(EvalLoader(reader, SMALL, batch, CPU, rank, world_size)) for rank in range(world_size)]


@pytest.mark.parametrize(("world_size", "batch"), [(1, 7), (3, 32), (5, 1000)])
def test_ranks_read_every_sample_once_in_order(shards, world_size, batch):
    ranks = load_all(shards, batch, world_size)
    num_samples = read_manifest(shards).num_samples
    sample_ids = [sample_id for rank in ranks for item in rank for sample_id in item.sample_ids.tolist()]
    assert sample_ids == list(range(num_samples))
    sizes = [sum(len(item.images) for item in rank) for rank in ranks]
    assert max(sizes) - min(sizes) <= batch
    assert [len(item.labels) for rank in ranks for item in rank] == [
        min(batch, num_samples - start) for start in range(0, num_samples, batch)
    ]


def test_labels_are_the_classes_of_the_image_folders(shards):
    manifest = read_manifest(shards)
    keys = [key for shard in manifest.shards for key in read_index(shards, shard).keys]
    (batches,) = load_all(shards, 32)
    for item in batches:
        assert item.labels.dtype == torch.int64
        for sample_id, label in zip(item.sample_ids.tolist(), item.labels.tolist(), strict=True):
            assert keys[sample_id].startswith(manifest.classes[label])


def test_pixels_are_torchvisions(shards):
    reader = ShardReader(shards)
    differences = []
    first = next(iter(EvalLoader(reader, PLAIN, 24, CPU)))
    locations = [(shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)][:24]
    for ours, (shard, index) in zip(first.images, locations, strict=True):
        image = Image.open(io.BytesIO(reader.read(shard, index))).convert("RGB")
        expected = CenterCrop(224)(Resize(256, InterpolationMode.BICUBIC)(image))
        ours = ours.permute(1, 2, 0).numpy() * 255
        differences.append(np.abs(ours.clip(0, 255) - np.asarray(expected, np.float32)).mean())
    assert np.mean(differences) < 0.5 and max(differences) < 1.5


@pytest.mark.parametrize("resize", [256, 224, 100])
def test_geometry_is_torchvisions_for_every_shape(resize):
    crop = min(resize, 96)
    sizes = np.random.default_rng(0).integers(1, 900, (200, 2))
    sizes = np.concatenate([sizes, [[1, 1], [500, 375], [375, 500], [333, 500], [257, 256], [256, 257]]])
    resized, corners = resize_and_crop_geometry(sizes, resize, crop)
    columns = np.arange(4096, dtype=np.int32)
    for (w, h), (height, width), (x, y) in zip(sizes.tolist(), resized.tolist(), corners.tolist(), strict=True):
        if max(width, height) > 4096:
            continue
        image = Resize(resize, InterpolationMode.NEAREST)(Image.new("L", (w, h)))
        assert image.size == (width, height)
        coordinates = np.stack(np.broadcast_arrays(columns[:height, None], columns[None, :width]))
        cut = CenterCrop(crop)(torch.from_numpy(coordinates))
        assert cut[:, 0, 0].tolist() == [y, x]


def test_iteration_can_be_abandoned_and_repeated(shards):
    loader = EvalLoader(ShardReader(shards), SMALL, 8, CPU)
    for _, item in zip(range(2), loader, strict=False):
        first = item
    again = list(loader)
    assert torch.equal(again[1].images, first.images) and len(again) == -(-len(loader) // 8)


@pytest.mark.parametrize("damage", ["header", "scan"])
def test_undecodable_image_is_named(shards, tmp_path, damage):
    copy = shutil.copytree(shards, tmp_path / "damaged")
    shard = read_manifest(copy).shards[1]
    index = read_index(copy, shard)
    with open(tar_path(copy, shard), "r+b") as file:
        file.seek(index.offsets[3])
        data = file.read(index.sizes[3])
        start = data.index(b"\xff\xda") + (0 if damage == "header" else 14)
        file.seek(index.offsets[3] + start)
        file.write(bytes(len(data) - start))
    with pytest.raises(UserError, match=rf"sample '{index.keys[3]}': cannot be decoded.*data_prep verify"):
        load_all(copy, 16)


def test_crop_larger_than_the_resized_image_is_rejected(shards):
    with pytest.raises(ValueError, match="resize: 200"):
        EvalLoader(ShardReader(shards), PLAIN, 8, CPU, resize=200)
