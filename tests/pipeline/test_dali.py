"""The GPU's graphs, built with CPU operators, have the CPU path's pixels; whole decoding has region decoding's."""

import io
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from pipeline.data.dali import Inputs, decode_boxes, eval_pipeline_def, placed_pipeline_def, training_pipeline_def
from pipeline.data.decode_options import (
    DEVICE_PADDING,
    HOST_PADDING,
    DecodeOptions,
    decode_options,
    decoder_memory,
    prefetch_depth,
)
from pipeline.data.decoder import ImageDecoder
from pipeline.data.eval_loader import resize_and_crop_geometry
from pipeline.data.loader import BatchBuilder
from pipeline.data.pixels import can_decode, jpeg_size, known_good_jpeg
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import DataSection

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WHOLE, REGION = DecodeOptions("cpu", roi=False), DecodeOptions("cpu", roi=True)
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
SIZES = ((64, 48), (67, 45), (33, 101), (17, 16), (250, 187), (1, 1))


class FixedInputs(NamedTuple):
    """A batch that is its inputs."""

    arrays: Inputs

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        return tuple(array[rows] for array in self.arrays)


def decode(pipeline_def, batches, batch_size, threads=2):
    """Return the pixels of each batch."""
    source = PrefetchThread(iter(batches), 1)
    decoder = ImageDecoder(pipeline_def, source, pytest.fail, batch_size, CPU, threads, 2)
    try:
        return [decoder.next()[1].clone() for _ in batches]
    finally:
        decoder.close()


def textured(width, height):
    """Return pixels with edges and colors, so that chroma upsampling matters."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (-(-height // 5), -(-width // 5), 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST), np.int16)
    return np.ascontiguousarray((pixels + rng.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8))


def progressive(pixels, subsampling):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", progressive=True, subsampling=subsampling)
    return file.getvalue()


ENCODERS = {name: partial(simplejpeg.encode_jpeg, colorsubsampling=name) for name in SUBSAMPLINGS[:-1]}
ENCODERS["gray"] = lambda pixels: simplejpeg.encode_jpeg(
    pixels[..., :1].copy(), colorspace="GRAY", colorsubsampling="Gray"
)
ENCODERS["progressive 4:2:0"] = partial(progressive, subsampling=2)
ENCODERS["progressive 4:4:4"] = partial(progressive, subsampling=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_whole_decoding_and_slicing_gives_the_regions_bits(kind):
    rng = np.random.default_rng(0)
    encoded, anchors, extents = [], [], []
    for width, height in SIZES:
        image = np.frombuffer(ENCODERS[kind](textured(width, height)), np.uint8)
        for box in range(8):
            low = rng.integers(0, (width, height)) if box else np.zeros(2, int)
            encoded.append(image)
            anchors.append(low)
            extents.append(rng.integers(1, np.array([width, height]) - low + 1) if box else (width, height))
    inputs = encoded, np.array(anchors, np.int32), np.array(extents, np.int32)
    regions, slices = (decode_boxes(inputs, options, CPU, threads=2) for options in (REGION, WHOLE))
    for region, part, (width, height) in zip(regions, slices, extents, strict=True):
        assert region.shape == (height, width, 3) and np.array_equal(region, part)


def build_specs(shards, recipe, sizes):
    """Return consecutive micro batches of these numbers of images."""
    reader = ShardReader(shards)
    builder = BatchBuilder(reader, recipe, 4, UndecodableSamples(reader, 0))
    specs, start = [], 0
    for size in sizes:
        locations = reader.sampler(recipe.seed).locate(np.arange(start, start + size))
        places = zip(locations.shard, locations.index_in_shard, strict=True)
        specs.append(builder.build(locations, [reader.read(*place) for place in places]))
        start += size
    return specs


def assert_same_pixels(ours, expected):
    for images, others in zip(ours, expected, strict=True):
        assert images.shape == others.shape and images.dtype == others.dtype == torch.float32
        difference = (images - others).abs() * 255
        # Pillow's resize rounds and clamps between its two passes, which changes few pixels at edges by more.
        assert difference.mean() < 0.3 and (difference > 1.01).float().mean() < 0.003


@pytest.mark.parametrize("crops", [1, 2])
def test_training_graph_of_the_gpu_has_the_cpus_pixels(shards, crops):
    overrides = [f"data.crops_per_image={crops}", "data.image_size=224", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"]
    recipe = load_recipe("demo_emae", ["engine.micro_batch=12", "data.global_batch=24", *overrides])
    specs = build_specs(shards, recipe, (12, 12, 5))
    on_cpu = decode(training_pipeline_def(recipe.data, REGION), specs, 12)
    on_gpu = decode(training_pipeline_def(recipe.data, WHOLE, all_in_dali=True), specs, 12)
    assert [len(images) for images in on_gpu] == [12, 12, 5]
    assert_same_pixels(on_gpu, on_cpu)


def test_evaluation_graph_of_the_gpu_has_the_cpus_pixels(shards):
    reader, data = ShardReader(shards), DataSection(mean=(0, 0, 0), std=(1, 1, 1))
    encoded = [reader.read(0, index) for index in range(int(reader.shard_sizes[0]))]
    geometry = resize_and_crop_geometry(np.array([jpeg_size(image) for image in encoded]), 256, 224)
    batches = [
        FixedInputs((encoded[rows], *(values[rows] for values in geometry))) for rows in (slice(8), slice(8, 13))
    ]
    on_cpu, on_gpu = (decode(eval_pipeline_def(data, WHOLE, all_in_dali), batches, 8) for all_in_dali in (False, True))
    assert [len(images) for images in on_gpu] == [8, 5]
    assert_same_pixels(on_gpu, on_cpu)


@pytest.mark.parametrize("all_in_dali", [False, True])
@pytest.mark.parametrize("options", [REGION, WHOLE])
def test_every_pipeline_decodes_the_good_image(options, all_in_dali):
    """Otherwise every undecodable image would be blamed on the device."""
    single, several = DataSection(image_size=16), DataSection(image_size=16, crops_per_image=2)
    for pipeline_def in (
        training_pipeline_def(single, options, all_in_dali=all_in_dali),
        training_pipeline_def(several, options, all_in_dali=all_in_dali),
        training_pipeline_def(single, options, "decode"),
        eval_pipeline_def(single, options, all_in_dali),
        placed_pipeline_def(single, options, all_in_dali),
    ):
        (pixels,) = decode(pipeline_def, [FixedInputs(pipeline_def.good_inputs)], 1)
        assert len(pixels) == 1 and pixels.isfinite().all()
    assert can_decode(known_good_jpeg()) and not can_decode(known_good_jpeg()[:200])


def test_cpu_decodes_regions_whatever_the_gpus_options_are():
    for roi in (True, False):
        assert decode_options(DataSection(roi_decode=roi, hw_decoder_load=0.5), CPU) == REGION


@pytest.mark.parametrize("load", [0.0, 0.3, 0.65, 1.0])
def test_deterministic_decoding_never_splits_a_batch(load):
    data = DataSection(hw_decoder_load=load)
    assert decode_options(data, GPU) == DecodeOptions("mixed", False, load)
    fixed = decode_options(data, GPU, deterministic=True).hw_decoder_load
    assert fixed in (0, 1) and (fixed == load or 0 < load < 1)
    assert decode_options(DataSection(roi_decode=True), GPU).roi


def test_decoder_memory_counts_buffers_and_batches():
    data = DataSection(image_size=224, prefetch=2)
    none, some = decoder_memory(data, 64, 0, mean_pixels=1000), decoder_memory(data, 64, 24, mean_pixels=1000)
    assert some.device - none.device == 24 * DEVICE_PADDING and none.pinned == 0
    assert some.pinned == 24 * 2 * HOST_PADDING
    assert none.device == 64 * (2 * 3 * 1000 + 5 * 4 * 3 * 224**2)
    several = decoder_memory(data.model_copy(update={"crops_per_image": 4}), 64, 0, mean_pixels=1000)
    assert none.device - several.device == 64 * 2 * 3 * 1000 * 3 / 4
    assert prefetch_depth(DataSection(), GPU) == 3 > prefetch_depth(DataSection(), CPU)
