"""The evaluation pipeline: torchvision's pixels, every sample once, its own label."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.eval_loader import EvalLoader, resized_and_cropped
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection

CPU = torch.device("cpu")
PLAIN = DataSection(mean=(0, 0, 0), std=(1, 1, 1))


def everything(shards, batch=32, world_size=1, data=PLAIN):
    reader = ShardReader(shards)
    loaders = [EvalLoader(reader, data, batch, CPU, rank, world_size) for rank in range(world_size)]
    return [list(loader) for loader in loaders]


@pytest.mark.parametrize(("world_size", "batch"), [(1, 7), (3, 32), (5, 1000)])
def test_the_ranks_see_every_sample_once_in_the_order_of_the_set(shards, world_size, batch):
    parts = everything(shards, batch, world_size, DataSection(image_size=16))
    manifest = read_manifest(shards)
    in_order = [key for shard in manifest.shards for key in read_index(shards, shard).keys]
    seen = [sample for part in parts for item in part for sample in item.samples.tolist()]
    assert seen == list(range(len(in_order)))
    sizes = [sum(len(item.images) for item in part) for part in parts]
    assert max(sizes) - min(sizes) <= batch
    assert [len(item.labels) for part in parts for item in part] == [
        min(batch, len(in_order) - start) for start in range(0, len(in_order), batch)
    ]


def test_labels_are_the_classes_of_the_photographs_folders(shards):
    reader = ShardReader(shards)
    classes = reader.manifest.classes
    keys = [key for shard in reader.manifest.shards for key in read_index(shards, shard).keys]
    (batches,) = everything(shards, 32, data=DataSection(image_size=16))
    for item in batches:
        assert item.labels.dtype == torch.int64
        for sample, label in zip(item.samples.tolist(), item.labels.tolist(), strict=True):
            assert keys[sample].startswith(classes[label])


def test_the_pixels_are_torchvisions(shards):
    reader = ShardReader(shards)
    transform = [Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)]
    differences = []
    first = next(iter(EvalLoader(reader, PLAIN, 24, CPU)))
    places = [(shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)][:24]
    for ours, (shard, index) in zip(first.images, places, strict=True):
        image = Image.open(io.BytesIO(reader.read(shard, index))).convert("RGB")
        for step in transform:
            image = step(image)
        ours = ours.permute(1, 2, 0).numpy() * 255
        differences.append(np.abs(ours.clip(0, 255) - np.asarray(image, np.float32)).mean())
    assert np.mean(differences) < 0.5 and max(differences) < 1.5


@pytest.mark.parametrize("resize", [256, 224, 100])
def test_sizes_and_corners_are_torchvisions_for_every_shape(resize):
    crop = min(resize, 96)
    sizes = np.random.default_rng(0).integers(1, 900, (200, 2))
    sizes = np.concatenate([sizes, [[1, 1], [500, 375], [375, 500], [333, 500], [257, 256], [256, 257]]])
    resized, corners = resized_and_cropped(sizes, resize, crop)
    columns = np.arange(4096, dtype=np.int32)
    for (w, h), (height, width), (x, y) in zip(
        sizes.tolist(), resized.tolist(), corners.tolist(), strict=True
    ):
        if max(width, height) > 4096:
            continue
        image = Resize(resize, InterpolationMode.NEAREST)(Image.new("L", (w, h)))
        assert image.size == (width, height)
        coordinates = np.stack(np.broadcast_arrays(columns[:height, None], columns[None, :width]))
        cut = CenterCrop(crop)(torch.from_numpy(coordinates))
        assert cut[:, 0, 0].tolist() == [y, x]


def test_it_can_be_iterated_again_and_left_in_the_middle(shards):
    loader = EvalLoader(ShardReader(shards), DataSection(image_size=16), 8, CPU)
    for _, item in zip(range(2), loader, strict=False):
        first = item
    again = list(loader)
    assert torch.equal(again[1].images, first.images) and len(again) == -(-len(loader) // 8)


def test_an_image_that_cannot_be_decoded_ends_it_with_its_name(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()) if path.is_file() else None
    shard = read_manifest(tmp_path).shards[1]
    index = read_index(tmp_path, shard)
    with open(tar_path(tmp_path, shard), "r+b") as file:
        file.seek(index.offsets[3])
        data = file.read(index.sizes[3])
        scan = data.index(b"\xff\xda")
        file.seek(index.offsets[3] + scan)
        file.write(bytes(len(data) - scan))
    with pytest.raises(UserError, match=rf"sample '{index.keys[3]}': cannot be decoded.*data_prep verify"):
        everything(tmp_path, 16, data=DataSection(image_size=16))


def test_a_square_larger_than_the_resized_image_is_refused(shards):
    with pytest.raises(ValueError, match="holds no square of 224"):
        EvalLoader(ShardReader(shards), PLAIN, 8, CPU, resize=200)
