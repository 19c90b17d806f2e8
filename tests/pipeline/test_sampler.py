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
streams = st.builds(ShardedSampler, shard_sizes, seeds, windows)


@st.composite
def mixtures(draw):
    sources = draw(st.lists(shard_sizes, min_size=1, max_size=4))
    weights = draw(st.lists(st.integers(1, 50), min_size=len(sources), max_size=len(sources)))
    return MixtureSampler(sources, weights, draw(seeds), draw(windows))


def fresh(stream):
    """The same stream in a new process, which knows nothing of what was read before."""
    if isinstance(stream, ShardedSampler):
        return ShardedSampler(stream.shard_sizes, stream.seed, stream.window)
    sizes = [own.shard_sizes for own in stream.streams]
    return MixtureSampler(sizes, stream.shares, stream.seed, stream.streams[0].window)


@given(streams, st.integers(0, 5))
def test_an_epoch_reads_every_sample_once(stream, epoch):
    size = stream.num_samples
    locations = stream.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert (locations.epoch == epoch).all()
    assert sorted(locations.sample) == list(range(size))
    assert ((locations.index >= 0) & (locations.index < stream.shard_sizes[locations.shard])).all()
    assert (locations.sample == stream.shard_starts[locations.shard] + locations.index).all()


@given(streams)
def test_at_any_time_only_one_windows_shards_are_read(stream):
    plan = stream.plan(0)
    shards = stream.locate(np.arange(stream.num_samples)).shard
    starts = np.concatenate([[0], plan.window_ends])
    for number, (start, end) in enumerate(zip(starts, plan.window_ends, strict=False)):
        window = plan.shards[number * stream.window : (number + 1) * stream.window]
        assert set(shards[start:end]) <= set(window)


@given(streams | mixtures(), st.data())
def test_a_position_does_not_depend_on_what_was_asked_before(stream, data):
    positions = data.draw(st.lists(st.integers(0, 4 * stream.num_samples), min_size=1, max_size=20))
    locations = stream.locate(np.array(positions))
    for row, position in enumerate(positions):
        alone = fresh(stream).locate(np.array([position]))
        assert [field[0] for field in alone] == [field[row] for field in locations]


@settings(max_examples=2000)  # about 2 T: so many because a run's whole guarantee of exact resume rests on it
@given(streams | mixtures(), st.data())
def test_a_history_of_stops_and_world_sizes_reads_what_one_undisturbed_rank_reads(stream, data):
    """Runs that stop anywhere, go back to a checkpoint, skip a span, continue on another number of ranks."""
    global_batch = data.draw(st.sampled_from([1, 2, 6, 12, 32, 64]))
    worlds = [size for size in range(1, 65) if global_batch % size == 0]
    leg = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 100), st.sampled_from(worlds))
    read: dict[int, np.ndarray] = {}
    offsets = [0]  # before each step; a checkpoint of a step holds its offset
    step = 0
    for steps, lost, skipped, world in data.draw(st.lists(leg, min_size=1, max_size=5)):
        resumed = fresh(stream)
        for number in range(step, step + steps):
            ranks = [rank_positions(number, global_batch, r, world, offsets[number]) for r in range(world)]
            read[number] = resumed.locate(np.concatenate(ranks)).sample
            if number == step:
                one, share = data.draw(st.integers(0, world - 1)), global_batch // world
                own = read[number][one * share : (one + 1) * share]
                assert resumed.locate(ranks[one]).sample.tolist() == own.tolist()
            offsets.append(offsets[number])
        offsets[step + steps] += skipped
        step = max(0, step + steps - lost)
        del offsets[step + 1 :]
    for number, samples in read.items():
        if number < step:  # what the run's final history holds
            start = offsets[number] + number * global_batch
            assert samples.tolist() == stream.locate(np.arange(start, start + global_batch)).sample.tolist()
    if offsets[-1] == 0 and isinstance(stream, ShardedSampler) and step * global_batch >= stream.num_samples:
        epoch = np.concatenate([read[number] for number in range(step)])[: stream.num_samples]
        assert sorted(epoch) == list(range(stream.num_samples))


def test_epochs_differ_and_seeds_differ_and_sources_differ():
    def order(seed, epoch, source):
        return tuple(ShardedSampler([50] * 8, seed, 2, source).locate(np.arange(400) + 400 * epoch).sample)

    orders = {order(seed, epoch, source) for seed in range(3) for epoch in range(3) for source in range(3)}
    assert len(orders) == 27


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="10 cannot be shared evenly by 4"):
        rank_positions(0, 10, 0, 4)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        ShardedSampler([0, 0], 0, 1)


@pytest.mark.parametrize("part", ["plan", "locate", "mixture"])
def test_planning_a_hundred_million_samples_takes_less_than_200_mb(part):
    """The time that it takes: benchmarks/plan_epoch.py."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "plan_epoch.py"
    printed = subprocess.check_output([sys.executable, str(benchmark), "part", part], text=True)
    assert int(re.fullmatch(r"\d+ ms, (\d+) MB\n", printed)[1]) < 200
