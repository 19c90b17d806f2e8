"""Errors of the device are never attributed to images. Real DALI pipelines, whose operators fail."""

import gc
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from corrupt_jpegs import damage_samples, no_tables
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from pipeline.data.dali import training_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.data.decoder import MAX_ONLY_PILLOW_DECODES, OUT_OF_MEMORY, ImageDecoder
from pipeline.data.loader import BatchBuilder
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.errors import DeviceError, StoppedEarly, UserError
from pipeline.recipe import load_recipe
from pipeline.train.preemption import describe_failure

pytestmark = pytest.mark.filterwarnings("ignore:The external source node")  # not all inputs are used
CPU = torch.device("cpu")
BATCH = 8
RECIPE = load_recipe("demo_emae", ["data.global_batch=8", "engine.micro_batch=8"])
TRAINING = training_pipeline_def(RECIPE.data, DecodeOptions())


class Decoding:
    """Decodes a shard set's first batches with a pipeline, and records undecodable samples in `directory`."""

    def __init__(self, shards, directory, pipeline_def, num_batches=6):
        self.reader, self.records = ShardReader(shards), directory / "replaced"
        self.undecodable = UndecodableSamples(self.reader, 100, self.records)
        builder = BatchBuilder(self.reader, RECIPE, 4, self.undecodable)
        sampler = self.reader.sampler(RECIPE.seed)

        def specs():
            for number in range(num_batches):
                locations = sampler.locate(np.arange(BATCH * number, BATCH * (number + 1)))
                places = zip(locations.shard, locations.index_in_shard, strict=True)
                yield builder.build(locations, [self.reader.read(*place) for place in places])

        source = PrefetchThread(specs(), 1)
        self.decoder = ImageDecoder(pipeline_def, source, builder.replace, BATCH, CPU, 1, 2, self.undecodable.confirm)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.decoder.close()

    def assert_nothing_recorded(self, caplog):
        assert not self.undecodable.count and not self.records.exists()
        assert not [text for text in caplog.messages if "cannot be decoded" in text]


def count_pipelines():
    return sum(type(thing) is Pipeline for thing in gc.get_objects())


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    return caplog


def decode_as(shape):
    """Return a pipeline that fails on images without this number of pixels."""
    return TRAINING._replace(build_graph=lambda encoded, *_: fn.reshape(fn.decoders.image(encoded), shape=shape))


def test_decoder_that_fails_on_every_image_is_a_device_error(shards, tmp_path, log):
    with Decoding(shards, tmp_path, decode_as([1, 1, 3])) as decoding:
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"cpu: does not decode a good image .*DALI: \S") as error:
                decoding.decoder.next()
        assert "\n" not in str(error.value) and isinstance(error.value, StoppedEarly)
        assert isinstance(error.value.__cause__, RuntimeError)
        assert describe_failure(error.value, 0).transient  # exit code 75: Slurm may start it on another node
        decoding.assert_nothing_recorded(log)


def test_several_failures_that_pillow_decodes_are_a_device_error(shards, tmp_path, log):
    with Decoding(shards, tmp_path, decode_as([48, 64, 3])) as decoding:  # the good image's shape
        with pytest.raises(DeviceError, match=f"{MAX_ONLY_PILLOW_DECODES + 1} images of a batch that Pillow decodes"):
            decoding.decoder.next()
        decoding.assert_nothing_recorded(log)


def test_batch_that_fails_although_its_images_decode_is_a_device_error(shards, tmp_path, log):
    def build_graph(encoded, *_):
        """Fail on batches whose images differ in shape."""
        images = fn.decoders.image(encoded)
        return fn.cat(images, fn.permute_batch(images, indices=[*range(1, BATCH), 0]), axis=0)

    one_image = TRAINING._replace(build_graph=lambda encoded, *_: fn.decoders.image(encoded))
    builds = []

    def build_first_to_fail(encoded, *inputs):
        builds.append(1)
        return (build_graph if len(builds) == 1 else one_image.build_graph)(encoded, *inputs)

    with Decoding(shards, tmp_path, TRAINING._replace(build_graph=build_first_to_fail)) as decoding:
        with pytest.raises(DeviceError, match="each image of a batch alone, but not the batch"):
            decoding.decoder.next()
        decoding.assert_nothing_recorded(log)


def test_lack_of_memory_names_the_micro_batch_and_no_image(shards, tmp_path, log):
    calls = []

    def fail_later(image):
        calls.append(1)
        if len(calls) > BATCH:
            raise RuntimeError("CUDA allocation failed")
        return image

    def build_graph(encoded, anchor, extent):
        image = fn.decoders.image_slice(encoded, anchor, extent, axis_names="WH")
        return fn.python_function(image, function=fail_later)

    with Decoding(shards, tmp_path, TRAINING._replace(build_graph=build_graph)) as decoding:
        decoding.decoder.next()
        with pytest.raises(
            UserError, match=r"^engine\.micro_batch: .*\d+ x \d+ pixels.*CUDA allocation failed"
        ) as error:
            decoding.decoder.next()
        assert "\n" not in str(error.value) and not describe_failure(error.value, 0).transient
        decoding.assert_nothing_recorded(log)


def test_lack_of_memory_for_the_buffers_is_a_user_error(shards, tmp_path):
    def build_graph(*_):
        raise MemoryError("Can't allocate 1234 bytes on device 0.")

    with pytest.raises(UserError, match=r"^engine\.micro_batch: .*buffers of 1 decoding threads: DALI: Can't allocate"):
        Decoding(shards, tmp_path, TRAINING._replace(build_graph=build_graph))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA allocation failed", True),
        ("Can't allocate 1234 bytes on device 0.", True),
        ("CUDA error: cudaErrorMemoryAllocation", True),
        ("std::bad_alloc", True),
        ("nvJPEG error (5): NVJPEG_STATUS_ALLOCATOR_FAILURE", True),
        ("Failed to allocate a buffer", True),
        ("Failed to decode sample #3", False),
        ("nvImageCodec failure: '#8'", False),
        ("CUDA runtime API error cudaErrorIllegalAddress (700): an illegal memory access was encountered", False),
    ],
)
def test_messages_about_memory_are_recognized(message, expected):
    assert bool(OUT_OF_MEMORY.search(message)) == expected


def test_bad_image_is_recorded_after_the_new_pipeline_and_the_old_one_is_freed(shards, tmp_path):
    locations = ShardReader(shards).sampler(RECIPE.seed).locate(np.array([3]))
    copy = shutil.copytree(shards, tmp_path / "damaged")
    (key,) = damage_samples(copy, [(int(locations.shard[0]), int(locations.index_in_shard[0]))], no_tables)
    gc.collect()
    before = count_pipelines()
    alive, recorded = [], []

    def build_graph(*inputs):
        alive.append(count_pipelines() - before)
        recorded.append((tmp_path / "replaced").exists())
        return TRAINING.build_graph(*inputs)

    with Decoding(copy, tmp_path, TRAINING._replace(build_graph=build_graph)) as decoding:
        for _ in range(6):
            decoding.decoder.next()
        (line,) = (decoding.records / "rank-0.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == key
    assert len(alive) >= 3 and alive[-1] == 1  # the first, single images, and the new one
    assert not any(recorded)
