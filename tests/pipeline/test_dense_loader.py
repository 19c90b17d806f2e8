"""Loaders with annotations: image and target of the same sample, placed alike, on any number of ranks."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from coco_data import read_instances, write_coco, write_instances
from forkserver import run as fork
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.dali import placed_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.data.dense_loader import DenseEvalLoader, DenseLoader
from pipeline.data.placement import Placement
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.instance_data import (
    EvalTransform,
    TrainTransform,
    leave_out_unlisted,
    read_annotations,
    select_annotated,
)

CPU = torch.device("cpu")
OVERRIDES = [
    "data.image_size=64",
    "data.global_batch=6",
    "engine.micro_batch=3",
    "data.mean=[0,0,0]",
    "data.std=[1,1,1]",
]
RECIPE = load_finetune_recipe("detect_tiny", "W", OVERRIDES)


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory):
    root = write_coco(tmp_path_factory.mktemp("coco"), 8)
    out = tmp_path_factory.mktemp("sets") / "train"
    built = fork(["-m", "data_prep", "coco", root, out, "--split", "train", "--shard-size", "3"])
    assert built.returncode == 0, built.stderr
    return out


def transform_of(reader):
    labels = {number: label for label, number in enumerate(reader.manifest.category_ids, 1)}
    return TrainTransform(3, 64, (0.5, 2.0), True, labels)


def load(path, steps=3, rank=0, world_size=1, first=0, filtered=False):
    """Return key, image and target of each sample of a rank's micro batches."""
    reader = ShardReader(path, RECIPE.data)
    if filtered:
        select_annotated(reader)
    loader = DenseLoader(reader, transform_of(reader), RECIPE, 4, CPU, rank, world_size, first)
    try:
        samples = []
        for _ in range(steps * (2 if world_size == 1 else 1)):
            batch = loader.next()
            assert batch.inputs[2] is batch.targets and batch.noise.shape == (3, 4)
            samples += zip(loader.keys(batch.locations), batch.images, batch.targets, strict=True)
        return samples
    finally:
        loader.close()


def test_samples_do_not_depend_on_ranks_or_restarts(coco_set):
    one = load(coco_set)
    two = [load(coco_set, rank=rank, world_size=2) for rank in range(2)]
    merged = [sample for step in range(3) for rank in two for sample in rank[3 * step : 3 * step + 3]]
    for samples in (merged, [*load(coco_set, steps=1), *load(coco_set, steps=2, first=1)]):
        for (key, image, target), (other_key, other_image, other_target) in zip(one, samples, strict=True):
            assert key == other_key and torch.equal(image, other_image)
            assert all(torch.equal(target[name], other_target[name]) for name in ("boxes", "labels", "masks"))


def test_images_without_instances_are_left_out_of_training_only(coco_set):
    plain, filtered = ({key for key, _, _ in load(coco_set, 3, filtered=on)} for on in (False, True))
    assert len(plain) == 8 and len(filtered) == 7 and filtered < plain
    readers = ShardReader(coco_set), ShardReader(coco_set)
    select_annotated(readers[0])
    assert readers[0].num_samples == 7 and readers[0].fingerprint != readers[1].fingerprint
    leave_out_unlisted("--val", readers[1])
    assert readers[1].num_samples == 8, "an image without instances is part of the validation set"


def test_images_that_the_annotation_file_does_not_list_are_left_out(tmp_path):
    root = write_coco(tmp_path / "coco", 3)
    tree = read_instances(root, "train2017")
    gone = [tree["images"].pop()["id"] for _ in range(2)]
    tree["annotations"] = [entry for entry in tree["annotations"] if entry["image_id"] not in gone]
    write_instances(root, tree, "train2017")
    arguments = ["-m", "data_prep", "coco", root, tmp_path / "set", "--split", "train", "--shard-size", "1"]
    assert fork(arguments).returncode == 0
    reader = ShardReader(tmp_path / "set")
    leave_out_unlisted("--val", reader)
    assert reader.num_samples == 1 and sorted(map(len, read_annotations(reader))) == [0, 0, 1]
    batches = list(DenseEvalLoader(reader, EvalTransform(64), RECIPE.data, 2, CPU))
    assert [batch.targets[0]["image_id"] for batch in batches] == [tree["images"][0]["id"]]


def test_pixels_are_pillows_at_the_place_of_the_target(coco_set):
    reader = ShardReader(coco_set, RECIPE.data)
    encoded = {
        reader.key(shard, index): reader.read(shard, index)
        for shard, size in enumerate(reader.shard_sizes)
        for index in range(size)
    }
    for key, pixels, target in load(coco_set, 1):
        with Image.open(io.BytesIO(encoded[key].tobytes())) as image:
            image = image.convert("RGB")
        height, width = target["size"]
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
        assert target["boxes"].shape == (len(target["labels"]), 4) and len(target["masks"]) == len(target["labels"])
        if max(height, width) < 64:  # not cropped, so the whole image is on the canvas
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            candidates = [np.asarray(each, np.float32) for each in (resized, resized.transpose(Image.FLIP_LEFT_RIGHT))]
            found = pixels[:, :height, :width].permute(1, 2, 0).numpy() * 255
            assert min(np.abs(found - each).mean() for each in candidates) < 1


def test_the_gpus_graph_places_pixels_like_the_cpu(coco_set):
    reader, generator = ShardReader(coco_set), np.random.default_rng(0)
    encoded = [reader.read(0, index) for index in range(3)]
    placements = []
    for image in encoded:
        stored = dali_size(image)
        size = tuple(int(length * generator.uniform(0.2, 0.6)) for length in stored)
        corner = tuple(int(generator.integers(0, max(1, length - 64))) for length in size)
        placements.append(Placement(stored, size, corner, (64, 64), bool(generator.integers(2))))
    arrays = [[p.flip for p in placements], [p.size[::-1] for p in placements], [p.corner for p in placements]]
    arrays += [[p.extent for p in placements], [(64, 64)] * 3]
    inputs = (encoded, *(np.array(value, np.int32) for value in arrays))
    pipeline = Pipeline(batch_size=3, num_threads=1, device_id=None)
    with pipeline:
        nodes = fn.external_source(source=lambda: inputs, num_outputs=6, batch=True)
        pipeline.set_outputs(placed_pipeline_def(RECIPE.data, DecodeOptions(), all_in_dali=True).build_graph(*nodes))
    pipeline.build()
    (graph,) = pipeline.run()
    on_cpu = placed_pipeline_def(RECIPE.data, DecodeOptions())
    for row, image in enumerate(encoded):
        out = torch.empty(3, 64, 64)
        with Image.open(io.BytesIO(image.tobytes())) as decoded:
            on_cpu.postprocess(inputs, row, torch.from_numpy(np.array(decoded.convert("RGB"))), out)
        difference = np.abs(np.array(graph[row]) - out.numpy())
        assert difference.shape == (3, 64, 64) and difference.mean() * 255 < 1 and np.median(difference) * 255 < 1


def dali_size(image):
    with Image.open(io.BytesIO(image.tobytes())) as decoded:
        return decoded.size


def test_an_undecodable_image_is_replaced_with_its_annotation(coco_set, tmp_path):
    copy = shutil.copytree(coco_set, tmp_path / "damaged")
    shard = read_manifest(copy).shards[0]
    index = read_index(copy, shard)
    chosen = next(i for i in range(len(index.keys)) if read_annotation(copy, i)["instances"])
    with open(tar_path(copy, shard), "r+b") as file:
        file.seek(index.offsets[chosen])
        data = file.read(index.sizes[chosen])
        start = data.index(b"\xff\xda")  # without a scan
        file.seek(index.offsets[chosen] + start)
        file.write(bytes(len(data) - start))
    intact, damaged = load(coco_set, 2), load(copy, 2)
    assert index.keys[chosen] in [key for key, *_ in intact]
    for (key, _, before), (other, _, after) in zip(intact, damaged, strict=True):
        assert key == other and (key != index.keys[chosen]) == same_target(before, after)


def same_target(one, other):
    return all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in ("boxes", "masks")
    )


def read_annotation(path, index):
    return json.loads(bytes(ShardReader(path).read_many(0, [index], "json")[0]))


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_every_sample_once_with_its_id(coco_set, world_size):
    reader, rows = ShardReader(coco_set), []
    for rank in range(world_size):
        for batch in DenseEvalLoader(reader, EvalTransform(64), RECIPE.data, 3, CPU, rank, world_size):
            assert batch.images.shape[1:] == (3, 64, 64)
            assert all(max(placement.extent) == 64 for placement in batch.placements)
            rows += zip(batch.sample_ids.tolist(), (target["image_id"] for target in batch.targets), strict=True)
    expected = [
        json.loads(bytes(data))["image_id"]
        for shard, size in enumerate(reader.shard_sizes)
        for data in reader.read_many(shard, range(size), "json")
    ]
    assert rows == list(enumerate(expected))


def test_a_damaged_annotation_is_named(coco_set):
    reader = ShardReader(coco_set)

    class Failing:
        extension = "json"

        def __call__(self, annotation, image_size, epoch, sample_id):
            raise ValueError("its json is damaged")

    with pytest.raises(UserError, match=rf"sample '{reader.key(0, 0)}': its json is damaged"):
        list(DenseEvalLoader(reader, Failing(), RECIPE.data, 3, CPU))
