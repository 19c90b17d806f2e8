"""Undecodable images although `verify` passed: real JPEGs, damaged in a copy of a shard set."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from corrupt_jpegs import damage_samples, find_frame, no_tables

from data_prep.shard_set import read_manifest, tar_path
from pipeline.data.dali import training_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.data.decoder import ImageDecoder
from pipeline.data.loader import BatchBuilder, Loader
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")
BATCH = 8


def no_start(data):
    data[:2] = b"XX"


def half_header(data):
    end = find_frame(data)[1]
    data[end:] = bytes(len(data) - end)


def no_pixels(data):
    """Set the size to 0 x 0."""
    frame, _ = find_frame(data)
    data[frame + 5 : frame + 9] = bytes(4)


@pytest.fixture
def damaged(shards, tmp_path):
    """A function that damages samples (shard, index) in a copy of the shard set; returns it and their keys."""
    copy = shutil.copytree(shards, tmp_path / "damaged")

    def damage(samples, how=no_tables):
        return copy, damage_samples(copy, samples, how)

    return damage


def recipe_of(*overrides):
    return load_recipe("demo_emae", [f"data.global_batch={2 * BATCH}", f"engine.micro_batch={BATCH}", *overrides])


def load_epoch(shards, recipe=None, rank=0, world_size=1, undecodable=None, labeled=False):
    """Return the micro batches of an epoch, rounded up to whole steps."""
    recipe = recipe or recipe_of()
    reader = ShardReader(shards)
    loader = Loader(reader, recipe, 16, CPU, rank, world_size, undecodable=undecodable, labeled=labeled)
    steps = -(-reader.num_samples // (2 * BATCH))
    try:
        return [loader.next() for _ in range(steps * recipe.gradient_accumulation_steps(world_size))]
    finally:
        loader.close()


def joined(batches):
    """Return images, noise, and sample ids, shards and indexes of the stream, of all the batches."""
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        *(
            np.concatenate([getattr(batch.locations, name) for batch in batches])
            for name in ("sample_id", "shard", "index_in_shard")
        ),
    )


def location_of(shards, position):
    """Return (shard, index) of a stream position."""
    locations = ShardReader(shards).sampler(recipe_of().seed).locate(np.array([position]))
    return int(locations.shard[0]), int(locations.index_in_shard[0])


@pytest.mark.parametrize("how", [no_tables, no_start, half_header, no_pixels])
def test_next_sample_substitutes_and_others_are_unchanged(shards, damaged, how, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    intact = joined(load_epoch(shards))
    copy, (key,) = damaged([location_of(shards, 3)], how)
    batches = load_epoch(copy)
    images, noise, samples, shard, index = joined(batches)
    assert samples.tolist() == intact[2].tolist() and torch.equal(noise, intact[1])
    hit = (shard == shard[3]) & (index == index[3])
    assert torch.equal(images[~hit], intact[0][~hit])
    assert (images[hit] != intact[0][hit]).flatten(1).any(1).all() and images.isfinite().all()
    assert [batch.replaced for batch in batches].count(0) < len(batches)
    assert sum(batch.replaced for batch in batches) == hit.sum()
    (message,) = (message for message in caplog.messages if repr(key) in message)
    assert "\n" not in message and ("DALI" in message or how is not no_tables)


@pytest.mark.parametrize("how", [no_start, no_tables])
def test_labels_are_those_of_the_decoded_samples(shards, damaged, how):
    reader = ShardReader(shards)
    bad = next(  # one whose substitute has another class
        (shard, i)
        for shard, i in (location_of(shards, n) for n in range(reader.num_samples))
        if len(set(reader.labels(shard)[[i, (i + 1) % reader.shard_sizes[shard]]])) == 2
    )
    copy, _ = damaged([bad], how)
    batches = load_epoch(copy, labeled=True)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    *_, shards_of, indexes = joined(batches)
    locations = list(zip(shards_of.tolist(), indexes.tolist(), strict=True))
    for (shard, i), label in zip(locations, labels, strict=True):
        decoded = (i + 1) % reader.shard_sizes[shard] if (shard, i) == bad else i
        assert label == reader.labels(shard)[decoded]
    assert bad in locations
    assert all(batch.labels is None for batch in load_epoch(shards)[:1])


def test_substitute_is_cropped_as_the_original_sample(shards, damaged):
    """Its pixels are those of its bytes at the stream position of the damaged sample."""
    shard, i = location_of(shards, 3)
    copy, _ = damaged([(shard, i)])
    ours = joined(load_epoch(copy))[0][3]

    recipe, reader = recipe_of(), ShardReader(shards)
    locations = reader.sampler(recipe.seed).locate(np.array([3]))
    neighbor = reader.read(shard, (i + 1) % int(reader.shard_sizes[shard]))
    spec = BatchBuilder(reader, recipe, 16, UndecodableSamples(reader, 0)).build(locations, [neighbor])
    source = PrefetchThread(iter([spec]), 1)
    decoder = ImageDecoder(training_pipeline_def(recipe.data, DecodeOptions()), source, None, 1, CPU, 1, 1)
    expected = decoder.next()[1][0]
    decoder.close()
    assert torch.equal(ours, expected)


def test_several_undecodable_samples_in_prefetched_batches(shards, damaged):
    """First and last of a batch, neighbors in the shard, and one in a later batch."""
    intact = joined(load_epoch(shards))
    first, *others = (location_of(shards, n) for n in (0, BATCH - 1, BATCH, 3 * BATCH + 1))
    size = int(ShardReader(shards).shard_sizes[first[0]])
    bad = {first, *others, (first[0], (first[1] + 1) % size)}
    copy, _ = damaged(sorted(bad))
    images, noise, samples, shard, index = joined(load_epoch(copy, recipe_of("data.prefetch=4")))
    hit = np.array([location in bad for location in zip(shard.tolist(), index.tolist(), strict=True)])
    assert hit.sum() >= 5
    assert samples.tolist() == intact[2].tolist() and torch.equal(noise, intact[1])
    assert torch.equal(images[~hit], intact[0][~hit]) and (images[hit] != intact[0][hit]).any()


def test_substitutes_do_not_depend_on_world_size(shards, damaged):
    copy, _ = damaged([location_of(shards, n) for n in (1, BATCH, 2 * BATCH + 3)])
    whole = load_epoch(copy)
    halves = [load_epoch(copy, rank=rank, world_size=2) for rank in (0, 1)]
    for number, (left, right) in enumerate(zip(*halves, strict=True)):
        assert torch.equal(left.images, whole[2 * number].images)
        assert torch.equal(right.images, whole[2 * number + 1].images)


def test_too_many_stop_the_run_and_are_named(shards, damaged, tmp_path):
    copy, keys = damaged([location_of(shards, n) for n in (0, 5, 9)])
    undecodable = UndecodableSamples(ShardReader(copy), 3, tmp_path / "replaced", rank=1)
    load_epoch(copy, recipe_of("data.max_undecodable=3"), undecodable=undecodable)
    lines = [json.loads(line) for line in (tmp_path / "replaced/rank-1.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == sorted(keys)
    assert all(line["shard"].endswith(".tar") and line["reason"] for line in lines)
    for directory in (tmp_path / "new", tmp_path / "replaced"):  # a new run, and one that resumes
        undecodable = UndecodableSamples(ShardReader(copy), 2, directory)
        assert undecodable.count == (3 if directory.exists() else 0)
        with pytest.raises(UserError, match=r"data\.max_undecodable") as error:
            load_epoch(copy, recipe_of("data.max_undecodable=2"), undecodable=undecodable)
        message = str(error.value)
        assert all(repr(key) in message for key in keys)
        assert f"python -m data_prep verify {copy}" in message and "\n" not in message
    assert not (tmp_path / "new").exists()  # no batch was decoded without them


def test_limit_of_zero_allows_no_substitute(shards, damaged):
    copy, (key,) = damaged([location_of(shards, 30)])
    with pytest.raises(UserError, match=f"more than 0 samples.*{key}"):
        load_epoch(copy, recipe_of("data.max_undecodable=0"))


def test_shard_without_a_decodable_image_stops_the_run(shards, damaged):
    sizes = ShardReader(shards).shard_sizes
    copy, _ = damaged([(len(sizes) - 1, i) for i in range(sizes[-1])])
    with pytest.raises(UserError, match="none of its samples can be decoded"):
        load_epoch(copy)


def test_batches_before_an_unreadable_one_are_returned(shards, damaged):
    copy, _ = damaged([])
    recipe = recipe_of("data.shuffle_window_shards=1", "data.prefetch=3")
    reader = ShardReader(copy, recipe.data)
    last = int(reader.sampler(recipe.seed).epoch_order(0).shards[-1])
    tar_path(copy, read_manifest(copy).shards[last]).unlink()
    loader = Loader(reader, recipe, 16, CPU)
    for _ in range((reader.num_samples - int(reader.shard_sizes[last])) // BATCH):
        loader.next()
    for _ in range(2):
        with pytest.raises(UserError, match="is missing"):
            loader.next()
    loader.close()
