import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Stream, rank_positions

shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
streams = st.builds(Stream, shard_sizes, st.integers(0, 2**63 - 1), st.integers(1, 14))


@given(streams, st.integers(0, 5))
def test_an_epoch_reads_every_sample_once(stream, epoch):
    size = stream.num_samples
    located = stream.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert (located.epoch == epoch).all()
    assert sorted(located.sample) == list(range(size))
    assert ((located.index >= 0) & (located.index < stream.shard_sizes[located.shard])).all()
    assert (located.sample == stream.shard_starts[located.shard] + located.index).all()


@given(streams)
def test_at_any_time_only_one_windows_shards_are_read(stream):
    plan = stream.plan(0)
    shards = stream.locate(np.arange(stream.num_samples)).shard
    starts = np.concatenate([[0], plan.window_ends])
    for number, (start, end) in enumerate(zip(starts, plan.window_ends, strict=False)):
        window = plan.shards[number * stream.window : (number + 1) * stream.window]
        assert set(shards[start:end]) <= set(window)


@given(streams, st.data())
def test_a_position_does_not_depend_on_what_was_asked_before(stream, data):
    positions = data.draw(st.lists(st.integers(0, 4 * stream.num_samples), min_size=1, max_size=20))
    fresh = Stream(stream.shard_sizes, stream.seed, stream.window)
    for position, sample in zip(positions, stream.locate(np.array(positions)).sample, strict=True):
        assert fresh.locate(np.array([position])).sample[0] == sample


@settings(max_examples=2000, deadline=None)
@given(streams, st.data())
def test_a_history_of_stops_and_world_sizes_reads_what_one_undisturbed_rank_reads(stream, data):
    """Runs that stop anywhere, go back to a checkpoint and continue on another number of ranks."""
    global_batch = data.draw(st.sampled_from([1, 2, 6, 12, 32, 64]))
    worlds = [size for size in range(1, 65) if global_batch % size == 0]
    legs = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=5))
    read: dict[int, list[int]] = {}
    step = 0
    for steps, lost in legs:
        world = data.draw(st.sampled_from(worlds))
        resumed = Stream(stream.shard_sizes, stream.seed, stream.window)  # a new process knows nothing
        for number in range(step, step + steps):
            ranks = [rank_positions(number, global_batch, rank, world) for rank in range(world)]
            read[number] = [int(sample) for rank in ranks for sample in resumed.locate(rank).sample]
        step = max(0, step + steps - lost)
    steps = max(read) + 1
    undisturbed = stream.locate(np.arange(steps * global_batch)).sample
    assert [sample for number in range(steps) for sample in read[number]] == undisturbed.tolist()


def test_epochs_differ_and_seeds_differ():
    def order(seed, epoch):
        return tuple(Stream([50] * 8, seed, 2).locate(np.arange(400) + 400 * epoch).sample)

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="10 cannot be shared evenly by 4"):
        rank_positions(0, 10, 0, 4)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Stream([0, 0], 0, 1)
