"""Several shard sets as one, and parts of them."""

import numpy as np
import pytest

from pipeline.data.mixture import MixtureSampler
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import ShardedSampler
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import DataSection, Source


def reader_of(shards, other, weights=(None, None), part="training", **settings):
    sources = [Source(path=str(path), weight=w) for path, w in zip((shards, other), weights, strict=True)]
    return ShardReader(sources, DataSection(**settings), part)


def keys(reader, count=None):
    """Of the stream's first samples, and each sample's identity."""
    locations = reader.stream(0).locate(np.arange(count or reader.num_samples))
    names = [reader.key(*place) for place in zip(locations.shard, locations.index, strict=True)]
    return names, locations.sample.tolist()


def test_without_weights_an_epoch_reads_every_sample_of_every_set_once(shards, other_shards):
    reader = reader_of(shards, other_shards)
    one = ShardReader(shards).num_samples
    assert isinstance(reader.stream(0), ShardedSampler) and reader.num_samples == 2 * one
    names, samples = keys(reader)
    assert sorted(samples) == list(range(2 * one))
    assert sorted(names) == sorted(2 * keys(ShardReader(shards))[0])  # the same photographs are in both
    first_half = np.array(samples[:one]) < one
    assert 0.3 < first_half.mean() < 0.7  # mixed, not one after the other


def test_with_weights_the_sets_come_in_those_shares(shards, other_shards):
    reader = reader_of(shards, other_shards, (3.0, 1.0))
    assert isinstance(reader.stream(0), MixtureSampler)
    one = ShardReader(shards).num_samples
    _, samples = keys(reader, 4096)
    assert (np.array(samples) < one).sum() == 3072
    assert len(set(samples)) == 2 * one


def test_a_sample_is_read_from_the_set_that_it_lies_in(shards, other_shards):
    reader = reader_of(shards, other_shards, (1.0, 1.0))
    alone = [ShardReader(shards), ShardReader(other_shards)]
    own_shards = len(alone[0].shard_sizes)
    locations = reader.stream(0).locate(np.arange(30))
    for shard, index in zip(locations.shard, locations.index, strict=True):
        number, own = divmod(int(shard), own_shards)
        source = alone[number]
        assert reader.read(shard, index).tobytes() == source.read(own, index).tobytes()
        assert reader.key(shard, index) == source.key(own, index)
        assert reader.name(shard) == source.name(own)


def test_a_share_of_every_class_holds_every_class_and_survives_another_sharding(shards, other_shards):
    few = DataSection(subset=0.1, subset_by_class=True)
    readers = [ShardReader(path, few) for path in (shards, other_shards)]
    assert set(keys(readers[0])[0]) == set(keys(readers[1])[0])
    labels = [readers[0].labels(shard) for shard in range(len(readers[0].shard_sizes))]
    assert set(np.concatenate(labels)) == set(range(len(readers[0].manifest.classes)))
    assert readers[0].fingerprint != ShardReader(shards, DataSection(subset=0.1)).fingerprint


def test_a_subset_is_the_same_samples_however_they_are_sharded_and_read(shards, other_shards):
    chosen, elsewhere = (
        keys(ShardReader(path, DataSection(subset=0.5, holdout=0.2)))[0] for path in (shards, other_shards)
    )
    assert sorted(chosen) == sorted(elsewhere)
    everything = keys(ShardReader(shards))[0]
    assert 0.2 < len(chosen) / len(everything) < 0.6
    held_out = keys(ShardReader(shards, DataSection(subset=0.5, holdout=0.2), "held_out"))[0]
    assert held_out and not set(held_out) & set(chosen)


def test_what_is_chosen_is_read_as_before(shards):
    whole, part = ShardReader(shards), ShardReader(shards, DataSection(subset=0.5))
    found = {
        whole.key(shard, index): whole.read(shard, index).tobytes()
        for shard, size in enumerate(whole.shard_sizes)
        for index in range(size)
    }
    for shard, size in enumerate(part.shard_sizes):
        images = part.read_many(shard, list(range(size)))
        for index, image in enumerate(images):
            assert image.tobytes() == found[part.key(shard, index)]


def test_a_part_without_a_sample_is_refused(shards, other_shards):
    with pytest.raises(UserError, match=f"data.subset: 1e-06 leaves no sample of {shards}; give a larger"):
        ShardReader(shards, DataSection(subset=1e-6))
    with pytest.raises(
        UserError, match=f"data.holdout: 0 leaves no sample of {shards} to be held out; give a l"
    ):
        ShardReader(shards, part="held_out")
    with pytest.raises(UserError, match=rf"data.holdout: 1 leaves no sample of {shards} to learn from"):
        ShardReader(shards, DataSection(holdout=1 - 1e-9))


def test_the_fingerprint_tells_whatever_changes_the_stream_and_nothing_else(shards, other_shards):
    different = [
        ShardReader(shards),
        ShardReader(other_shards),
        reader_of(shards, other_shards),
        reader_of(other_shards, shards),
        reader_of(shards, other_shards, (1.0, 1.0)),
        reader_of(shards, other_shards, (2.0, 1.0)),
        reader_of(shards, other_shards, subset=0.5),
        reader_of(shards, other_shards, subset=0.4),
        reader_of(shards, other_shards, holdout=0.4),
        reader_of(shards, other_shards, part="held_out", holdout=0.4),
    ]
    assert len({reader.fingerprint for reader in different}) == len(different)
    same = [
        reader_of(shards, other_shards, (0.2, 0.1)),
        reader_of(shards, other_shards, (2.0, 1.0), readers=1, timeout_s=3.0),
    ]
    assert {reader.fingerprint for reader in same} == {different[5].fingerprint}


def test_classes_are_asked_of_one_set_only(shards, other_shards):
    assert ShardReader(shards).manifest.num_samples
    with pytest.raises(UserError, match="one shard set is needed here"):
        reader_of(shards, other_shards).manifest  # noqa: B018


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sources=[{path: a}, {path: a}]"], "data.sources: a stands there twice"),
        (["data.sources=[{path: a, weight: 1}, {path: b}]"], "give every source a weight, or none"),
        (["data.sources=[{path: a, weight: 0}]"], "data.sources.0.weight: "),
        (["data.sources=[{path: a, weigth: 2}]"], "sources.0.weigth: unknown key (did you mean weight?)"),
        (["data.sources=[{path: a, weight: 1}, {path: b, weight: 1.0e-7}]"], "is less than 1e-06 of the sum"),
        (["data.sources=[]"], "data.sources: "),
        (["data.subset=0"], "data.subset: "),
        (["data.holdout=1"], "data.holdout: "),
        (["data.cache_dir=x"], "data.cache_dir, data.cache_gb: give both or neither"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(overrides, expected):
    with pytest.raises(UserError) as caught:
        load_recipe("demo_emae", overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_shard_sets_are_named_once():
    own = load_recipe("demo_emae", ["data.sources=[{path: a, weight: 2}]"])
    assert own.sources([]) == (Source(path="a", weight=2.0),)
    with pytest.raises(UserError, match=r"--data b, data.sources: both name shard sets"):
        own.sources(["b"])
    recipe = load_recipe("demo_emae")
    assert recipe.sources(["a", "b"]) == (Source(path="a"), Source(path="b"))
    with pytest.raises(UserError, match="--data a: stands there twice"):
        recipe.sources(["a", "a"])
    with pytest.raises(UserError, match=r"--data, data.sources: name a shard set"):
        recipe.sources([])
