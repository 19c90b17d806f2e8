import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import MixtureSampler
from pipeline.data.sampler import ShardedSampler, rank_positions

shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
seeds = st.integers(0, 2**63 - 1)
windows = st.integers(1, 14)
samplers = st.builds(ShardedSampler, shard_sizes, seeds, windows)


@st.composite
def mixtures(draw):
    sources = draw(st.lists(shard_sizes, min_size=1, max_size=4))
    weights = draw(st.lists(st.integers(1, 50), min_size=len(sources), max_size=len(sources)))
    return MixtureSampler(sources, weights, draw(seeds), draw(windows))


def fresh(sampler):
    """The same sampler in a new process, with empty caches."""
    if isinstance(sampler, ShardedSampler):
        return ShardedSampler(sampler.shard_sizes, sampler.seed, sampler.window)
    sizes = [source.shard_sizes for source in sampler.samplers]
    return MixtureSampler(sizes, sampler.shares, sampler.seed, sampler.samplers[0].window)


@given(samplers, st.integers(0, 5))
def test_epoch_reads_every_sample_once(sampler, epoch):
    size = sampler.num_samples
    locations = sampler.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert (locations.epoch == epoch).all()
    assert sorted(locations.sample_id) == list(range(size))
    index = locations.index_in_shard
    assert ((index >= 0) & (index < sampler.shard_sizes[locations.shard])).all()
    assert (locations.sample_id == sampler.shard_starts[locations.shard] + index).all()


@given(samplers)
def test_only_one_windows_shards_are_read_at_a_time(sampler):
    order = sampler.epoch_order(0)
    shards = sampler.locate(np.arange(sampler.num_samples)).shard
    starts = np.concatenate([[0], order.window_ends])
    for number, (start, end) in enumerate(zip(starts, order.window_ends, strict=False)):
        window = order.shards[number * sampler.window : (number + 1) * sampler.window]
        assert set(shards[start:end]) <= set(window)


@given(samplers | mixtures(), st.data())
def test_location_does_not_depend_on_earlier_calls(sampler, data):
    positions = data.draw(st.lists(st.integers(0, 4 * sampler.num_samples), min_size=1, max_size=20))
    locations = sampler.locate(np.array(positions))
    for row, position in enumerate(positions):
        alone = fresh(sampler).locate(np.array([position]))
        assert [field[0] for field in alone] == [field[row] for field in locations]


@settings(max_examples=600)  # so many because exact resume depends on it
@given(samplers | mixtures(), st.data())
def test_interrupted_runs_read_what_one_undisturbed_rank_reads(sampler, data):
    """Runs that stop anywhere, return to a checkpoint, skip a span, resume with another world size."""
    global_batch = data.draw(st.sampled_from([1, 2, 6, 12, 32, 64]))
    world_sizes = [size for size in range(1, 65) if global_batch % size == 0]
    leg = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 100), st.sampled_from(world_sizes))
    read: dict[int, np.ndarray] = {}
    offsets = [0]  # before each step; a checkpoint stores the offset of its step
    step = 0
    for steps, lost, skipped, world_size in data.draw(st.lists(leg, min_size=1, max_size=5)):
        resumed = fresh(sampler)
        for number in range(step, step + steps):
            ranks = [
                rank_positions(number, global_batch, rank, world_size, offsets[number]) for rank in range(world_size)
            ]
            read[number] = resumed.locate(np.concatenate(ranks)).sample_id
            if number == step:
                rank, per_rank = data.draw(st.integers(0, world_size - 1)), global_batch // world_size
                of_rank = read[number][rank * per_rank : (rank + 1) * per_rank]
                assert resumed.locate(ranks[rank]).sample_id.tolist() == of_rank.tolist()
            offsets.append(offsets[number])
        offsets[step + steps] += skipped
        step = max(0, step + steps - lost)
        del offsets[step + 1 :]
    for number, samples in read.items():
        if number < step:  # part of the run's final history
            start = offsets[number] + number * global_batch
            expected = sampler.locate(np.arange(start, start + global_batch))
            assert samples.tolist() == expected.sample_id.tolist()
    if offsets[-1] == 0 and isinstance(sampler, ShardedSampler) and step * global_batch >= sampler.num_samples:
        epoch = np.concatenate([read[number] for number in range(step)])[: sampler.num_samples]
        assert sorted(epoch) == list(range(sampler.num_samples))


def test_epochs_seeds_and_sources_have_different_orders():
    def order(seed, epoch, source):
        sampler = ShardedSampler([50] * 8, seed, 2, source)
        return tuple(sampler.locate(np.arange(400) + 400 * epoch).sample_id)

    orders = {order(seed, epoch, source) for seed in range(3) for epoch in range(3) for source in range(3)}
    assert len(orders) == 27


def test_batch_not_divisible_by_world_size_is_rejected():
    with pytest.raises(ValueError, match="10 cannot be shared evenly by 4"):
        rank_positions(0, 10, 0, 4)


def test_sampler_without_samples_is_rejected():
    with pytest.raises(ValueError, match="at least one sample"):
        ShardedSampler([0, 0], 0, 1)


@pytest.mark.parametrize("part", ["plan", "locate", "mixture"])
def test_ordering_100_million_samples_takes_less_than_200_mb(part):
    """benchmarks/plan_epoch.py also measures the time."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "plan_epoch.py"
    printed = subprocess.check_output([sys.executable, str(benchmark), "part", part], text=True)
    assert int(re.fullmatch(r"\d+ ms, (\d+) MB\n", printed)[1]) < 200
