"""Several shard sets as one stream, and subsets of them."""

import numpy as np
import pytest

from pipeline.data.mixture import MixtureSampler
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import ShardedSampler
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import DataSection, Source


def reader_of(shards, other, weights=(None, None), split="training", **settings):
    sources = [Source(path=str(path), weight=w) for path, w in zip((shards, other), weights, strict=True)]
    return ShardReader(sources, DataSection(**settings), split)


def first_samples(reader, count=None):
    """Return keys and ids of the stream's first samples, by default of an epoch."""
    locations = reader.sampler(0).locate(np.arange(count or reader.num_samples))
    pairs = zip(locations.shard, locations.index_in_shard, strict=True)
    return [reader.key(*location) for location in pairs], locations.sample_id.tolist()


def test_without_weights_an_epoch_reads_all_samples_once(shards, other_shards):
    reader = reader_of(shards, other_shards)
    one = ShardReader(shards).num_samples
    assert isinstance(reader.sampler(0), ShardedSampler) and reader.num_samples == 2 * one
    keys, samples = first_samples(reader)
    assert sorted(samples) == list(range(2 * one))
    assert sorted(keys) == sorted(2 * first_samples(ShardReader(shards))[0])  # both contain the same photographs
    first_half = np.array(samples[:one]) < one
    assert 0.3 < first_half.mean() < 0.7  # mixed, not one set after the other


def test_weights_are_the_shares_of_the_sets(shards, other_shards):
    reader = reader_of(shards, other_shards, (3.0, 1.0))
    assert isinstance(reader.sampler(0), MixtureSampler)
    one = ShardReader(shards).num_samples
    _, samples = first_samples(reader, 4096)
    assert (np.array(samples) < one).sum() == 3072
    assert len(set(samples)) == 2 * one


def test_samples_of_a_mixture_are_read_from_their_set(shards, other_shards):
    reader = reader_of(shards, other_shards, (1.0, 1.0))
    readers = [ShardReader(shards), ShardReader(other_shards)]
    num_shards = len(readers[0].shard_sizes)
    locations = reader.sampler(0).locate(np.arange(30))
    for shard, index in zip(locations.shard, locations.index_in_shard, strict=True):
        number, own_shard = divmod(int(shard), num_shards)
        alone = readers[number]
        assert reader.read(shard, index).tobytes() == alone.read(own_shard, index).tobytes()
        assert reader.key(shard, index) == alone.key(own_shard, index)
        assert reader.shard_path(shard) == alone.shard_path(own_shard)


def test_class_balanced_subset_survives_another_sharding(shards, other_shards):
    few = DataSection(subset=0.1, subset_by_class=True)
    readers = [ShardReader(path, few) for path in (shards, other_shards)]
    assert set(first_samples(readers[0])[0]) == set(first_samples(readers[1])[0])
    labels = [readers[0].labels(shard) for shard in range(len(readers[0].shard_sizes))]
    assert set(np.concatenate(labels)) == set(range(len(readers[0].manifest.classes)))
    assert readers[0].fingerprint != ShardReader(shards, DataSection(subset=0.1)).fingerprint


def test_subset_survives_another_sharding(shards, other_shards):
    data = DataSection(subset=0.5, holdout=0.2)
    selected, elsewhere = (first_samples(ShardReader(path, data))[0] for path in (shards, other_shards))
    assert sorted(selected) == sorted(elsewhere)
    assert 0.2 < len(selected) / ShardReader(shards).num_samples < 0.6
    held_out = first_samples(ShardReader(shards, data, "held_out"))[0]
    assert held_out and not set(held_out) & set(selected)


def test_samples_of_a_subset_have_their_own_bytes(shards):
    whole, part = ShardReader(shards), ShardReader(shards, DataSection(subset=0.5))
    expected = {
        whole.key(shard, index): whole.read(shard, index).tobytes()
        for shard, size in enumerate(whole.shard_sizes)
        for index in range(size)
    }
    for shard, size in enumerate(part.shard_sizes):
        for index, image in enumerate(part.read_many(shard, list(range(size)))):
            assert image.tobytes() == expected[part.key(shard, index)]


@pytest.mark.parametrize(
    ("settings", "split", "key"),
    [
        ({"subset": 1e-6}, "training", "data.subset: 1e-06"),
        ({}, "held_out", "data.holdout: 0 "),
        ({"holdout": 1 - 1e-9}, "training", "data.holdout: 1 "),
    ],
)
def test_split_without_a_sample_is_rejected(shards, settings, split, key):
    with pytest.raises(UserError, match=f"^{key}.*{shards}"):
        ShardReader(shards, DataSection(**settings), split)


def test_fingerprint_changes_exactly_with_the_stream(shards, other_shards):
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
        reader_of(shards, other_shards, split="held_out", holdout=0.4),
    ]
    assert len({reader.fingerprint for reader in different}) == len(different)
    same = [
        reader_of(shards, other_shards, (0.2, 0.1)),
        reader_of(shards, other_shards, (2.0, 1.0), read_threads=1, timeout_s=3.0),
    ]
    assert {reader.fingerprint for reader in same} == {different[5].fingerprint}


def test_manifest_of_several_sets_is_rejected(shards, other_shards):
    assert ShardReader(shards).manifest.num_samples
    with pytest.raises(UserError, match=str(other_shards)):
        reader_of(shards, other_shards).manifest  # noqa: B018


def test_the_same_set_twice_is_rejected(shards):
    with pytest.raises(UserError, match="same shard set"):
        reader_of(shards, f"{shards}/.")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.sources=[{path: a}, {path: a}]"], "data.sources: a"),
        (["data.sources=[{path: a, weight: 1}, {path: b}]"], "data.sources: give every source a weight"),
        (["data.sources=[{path: a, weight: 0}]"], "data.sources.0.weight: "),
        (["data.sources=[{path: a, weigth: 2}]"], "sources.0.weigth: unknown key (did you mean weight?)"),
        (["data.sources=[{path: a, weight: 1}, {path: b, weight: 1.0e-7}]"], "data.sources: weight 1e-07"),
        (["data.sources=[]"], "data.sources: "),
        (["data.subset=0"], "data.subset: "),
        (["data.holdout=1"], "data.holdout: "),
        (["data.cache_dir=x"], "data.cache_dir, data.cache_gb: "),
    ],
)
def test_invalid_data_section_is_rejected_with_its_key(overrides, key):
    with pytest.raises(UserError) as error:
        load_recipe("demo_emae", overrides)
    assert key in str(error.value) and "\n" not in str(error.value)


def test_shard_sets_come_from_the_recipe_or_the_command():
    with_sources = load_recipe("demo_emae", ["data.sources=[{path: a, weight: 2}]"])
    assert with_sources.resolve_sources([]) == (Source(path="a", weight=2.0),)
    with pytest.raises(UserError, match=r"--data b, data.sources: "):
        with_sources.resolve_sources(["b"])
    recipe = load_recipe("demo_emae")
    assert recipe.resolve_sources(["a", "b"]) == (Source(path="a"), Source(path="b"))
    with pytest.raises(UserError, match="--data a: "):
        recipe.resolve_sources(["a", "a"])
    with pytest.raises(UserError, match=r"--data, data.sources: "):
        recipe.resolve_sources([])
