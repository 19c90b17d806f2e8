"""Images that cannot be decoded although `verify` passed them: real JPEGs, damaged in a copy of a set."""

import json
import shutil

import numpy as np
import pytest
import torch

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.dali import Decoder, training_pipeline_def
from pipeline.data.loader import BatchBuilder, Loader
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")
BATCH = 8


def no_header(data):
    data[:2] = b"XX"


def no_scan(data):
    """A sound header, and nothing to decode after it."""
    frame = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    end = frame + 2 + (data[frame + 2] << 8 | data[frame + 3])
    data[end:] = bytes(len(data) - end)


def no_pixels(data):
    """A frame of 0 x 0 pixels."""
    frame = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    data[frame + 5 : frame + 9] = bytes(4)


@pytest.fixture
def damaged(shards, tmp_path):
    """A copy of the shard set; the function damages samples of its shards in place and returns their keys."""
    copy = tmp_path / "damaged"
    shutil.copytree(shards, copy)

    def damage(samples, how=no_scan):
        keys = []
        for number, i in samples:
            shard = read_manifest(copy).shards[number]
            index = read_index(copy, shard)
            with open(tar_path(copy, shard), "r+b") as file:
                file.seek(index.offsets[i])
                data = bytearray(file.read(index.sizes[i]))
                how(data)
                file.seek(index.offsets[i])
                file.write(data)
            keys.append(index.keys[i])
        return copy, keys

    return damage


def recipe_of(*overrides):
    return load_recipe(
        "demo_emae", [f"data.global_batch={2 * BATCH}", f"engine.micro_batch={BATCH}", *overrides]
    )


def an_epoch(shards, recipe=None, rank=0, world_size=1, undecodable=None, labelled=False):
    """The micro batches of an epoch, and a little more."""
    recipe = recipe or recipe_of()
    reader = ShardReader(shards)
    loader = Loader(reader, recipe, 16, CPU, rank, world_size, undecodable=undecodable, labelled=labelled)
    steps = -(-reader.num_samples // (2 * BATCH))
    try:
        return [loader.next() for _ in range(steps * recipe.accumulation(world_size))]
    finally:
        loader.close()


def joined(batches):
    """Images, noise, and the stream's samples, shards and indexes, of all the batches."""
    locations = [batch.locations for batch in batches]
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        *(
            np.concatenate([getattr(place, name) for place in locations])
            for name in ("sample", "shard", "index")
        ),
    )


def place_of(shards, position):
    """(shard, index) of a stream position."""
    locations = ShardReader(shards).stream(recipe_of().seed).locate(np.array([position]))
    return int(locations.shard[0]), int(locations.index[0])


@pytest.mark.parametrize("how", [no_header, no_scan, no_pixels])
def test_the_next_sample_stands_in_and_all_others_are_the_same_to_the_bit(shards, damaged, how, capfd):
    sound = joined(an_epoch(shards))
    copy, (key,) = damaged([place_of(shards, 3)], how)
    batches = an_epoch(copy)
    images, noise, samples, shard, index = joined(batches)
    assert samples.tolist() == sound[2].tolist() and torch.equal(noise, sound[1])
    hit = (shard == shard[3]) & (index == index[3])
    assert torch.equal(images[~hit], sound[0][~hit])
    assert (images[hit] != sound[0][hit]).flatten(1).any(1).all() and images.isfinite().all()
    assert [batch.replaced for batch in batches].count(0) < len(batches)
    assert sum(batch.replaced for batch in batches) == hit.sum()
    said = capfd.readouterr().err
    assert said.count(f"sample {key!r}: cannot be decoded") == 1 and "\n\n" not in said


@pytest.mark.parametrize("how", [no_header, no_scan])
def test_labels_are_those_of_the_samples_that_were_decoded(shards, damaged, how):
    reader = ShardReader(shards)
    place = next(  # whose neighbour is of another class
        (shard, i)
        for shard, i in (place_of(shards, n) for n in range(reader.num_samples))
        if len(set(reader.labels(shard)[[i, (i + 1) % reader.shard_sizes[shard]]])) == 2
    )
    copy, _ = damaged([place], how)
    batches = an_epoch(copy, labelled=True)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    locations = [
        at for batch in batches for at in zip(batch.locations.shard, batch.locations.index, strict=True)
    ]
    for (shard, i), label in zip(locations, labels, strict=True):
        read = (i + 1) % reader.shard_sizes[shard] if (shard, i) == place else i
        assert label == reader.labels(int(shard))[read]
    assert place in locations
    assert all(batch.labels is None for batch in an_epoch(shards)[:1])


def test_what_stands_in_is_cut_by_the_random_numbers_of_the_sample_that_was_to_be_read(shards, damaged):
    """The same pixels as where the neighbour's bytes lie in that sample's own place."""
    number, i = place_of(shards, 3)
    size = int(ShardReader(shards).shard_sizes[number])
    copy, _ = damaged([(number, i)])
    ours = joined(an_epoch(copy))[0][3]

    recipe = recipe_of()
    reader = ShardReader(shards)
    locations = reader.stream(recipe.seed).locate(np.array([3]))
    neighbour = reader.read(number, (i + 1) % size)
    planned = BatchBuilder(reader, recipe, 16, UndecodableSamples(reader, 0)).plan(locations, [neighbour])

    decoder = Decoder(
        training_pipeline_def(recipe.data, False), PrefetchThread(iter([planned]), 1), None, 1, CPU, 1, 1
    )
    expected = decoder.next()[1][0]
    decoder.close()
    assert torch.equal(ours, expected)


def test_several_in_one_batch_first_last_and_neighbours_in_the_shard_while_decoding_is_ahead(shards, damaged):
    sound = joined(an_epoch(shards))
    first, last, other, later = (place_of(shards, n) for n in (0, BATCH - 1, BATCH, 3 * BATCH + 1))
    size = int(ShardReader(shards).shard_sizes[first[0]])
    follower = (first[0], (first[1] + 1) % size)
    bad = {first, last, other, later, follower}
    copy, _ = damaged(sorted(bad))
    images, noise, samples, shard, index = joined(an_epoch(copy, recipe_of("data.prefetch=4")))
    hit = np.array([place in bad for place in zip(shard.tolist(), index.tolist(), strict=True)])
    assert hit.sum() >= 5
    assert samples.tolist() == sound[2].tolist() and torch.equal(noise, sound[1])
    assert torch.equal(images[~hit], sound[0][~hit]) and (images[hit] != sound[0][hit]).any()


def test_what_stands_in_does_not_depend_on_the_number_of_ranks(shards, damaged):
    copy, _ = damaged([place_of(shards, n) for n in (1, BATCH, 2 * BATCH + 3)])
    whole = an_epoch(copy)
    halves = [an_epoch(copy, rank=rank, world_size=2) for rank in (0, 1)]
    for number, (left, right) in enumerate(zip(*halves, strict=True)):
        assert torch.equal(left.images, whole[2 * number].images)
        assert torch.equal(right.images, whole[2 * number + 1].images)


def test_too_many_stop_the_run_and_are_named(shards, damaged, tmp_path):
    places = [place_of(shards, n) for n in (0, 5, 9)]
    copy, keys = damaged(places)
    recipe = recipe_of("data.max_undecodable=2")
    for _ in range(2):  # a second start must not take them for granted
        undecodable = UndecodableSamples(ShardReader(copy), 2, tmp_path / "replaced", rank=1)
        with pytest.raises(UserError) as error:
            an_epoch(copy, recipe, undecodable=undecodable)
        message = str(error.value)
        assert "data.max_undecodable" in message and all(repr(key) in message for key in keys)
        assert f"python -m data_prep verify {copy}" in message and "\n" not in message
    lines = [json.loads(line) for line in (tmp_path / "replaced/rank-1.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == sorted(keys)
    assert all(line["shard"].endswith(".tar") and line["reason"] for line in lines)
    undecodable = UndecodableSamples(ShardReader(copy), 3, tmp_path / "replaced", rank=0)
    assert undecodable.found == 3
    an_epoch(copy, recipe_of("data.max_undecodable=3"), undecodable=undecodable)


def test_none_may_be_replaced_where_the_recipe_says_so(shards, damaged):
    copy, (key,) = damaged([place_of(shards, 30)])
    with pytest.raises(UserError, match=f"more than 0 samples.*{key}"):
        an_epoch(copy, recipe_of("data.max_undecodable=0"))


def test_a_shard_without_any_sound_image_stops_the_run(shards, damaged):
    size = int(ShardReader(shards).shard_sizes[-1])
    last = len(ShardReader(shards).shard_sizes) - 1
    copy, _ = damaged([(last, i) for i in range(size)])
    with pytest.raises(UserError, match="none of its samples can be decoded"):
        an_epoch(copy)


def test_batches_before_one_that_cannot_be_read_are_given_out(shards, damaged):
    """Also those that are still being decoded when the end is met."""
    copy, _ = damaged([])
    recipe = recipe_of("data.shuffle_window_shards=1", "data.prefetch=3")
    reader = ShardReader(copy, recipe.data)
    last = int(reader.stream(recipe.seed).plan(0).shards[-1])
    tar_path(copy, read_manifest(copy).shards[last]).unlink()
    loader = Loader(reader, recipe, 16, CPU)
    for _ in range((reader.num_samples - int(reader.shard_sizes[last])) // BATCH):
        loader.next()
    for _ in range(2):
        with pytest.raises(UserError, match="is missing"):
            loader.next()
    assert "is missing" in str(loader.failure)
    loader.close()
