from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import MixtureSampler

sizes = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda shards: sum(shards) > 0)


@st.composite
def mixtures(draw):
    sources = draw(st.lists(sizes, min_size=1, max_size=4))
    weights = draw(st.lists(st.integers(1, 1000), min_size=len(sources), max_size=len(sources)))
    return MixtureSampler(sources, weights, draw(st.integers(0, 2**63 - 1)), draw(st.integers(1, 5)))


@settings(deadline=None)
@given(mixtures(), st.integers(1, 12_000))
def test_each_sources_epoch_reads_each_sample_once(mixture, count):
    locations = mixture.locate(np.arange(count))
    first = 0
    for sampler in mixture.samplers:
        size = sampler.num_samples
        rows = (locations.sample_id >= first) & (locations.sample_id < first + size)
        samples, epochs = locations.sample_id[rows] - first, locations.epoch[rows]
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert (epochs == np.arange(len(samples)) // size).all()
        first += size


@settings(deadline=None)
@given(mixtures())
def test_sample_id_counts_through_all_sources(mixture):
    shard_sizes = np.concatenate([sampler.shard_sizes for sampler in mixture.samplers])
    starts = np.cumsum(shard_sizes) - shard_sizes
    locations = mixture.locate(np.arange(500))
    assert (locations.sample_id == starts[locations.shard] + locations.index_in_shard).all()
    assert (locations.index_in_shard < shard_sizes[locations.shard]).all()


@example([165, 1, 1, 733], 62385)  # one share is an integer: it must not be rounded up
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**6))
def test_shares_are_exact_to_one_draw_after_every_block(weights, blocks):
    mixture = MixtureSampler([[1]] * len(weights), weights, 0, 1)
    counts = mixture._draw_counts(blocks)
    assert counts.sum() == blocks * mixture.block_size
    for count, weight in zip(counts.tolist(), weights, strict=True):
        assert abs(count - Fraction(weight, sum(weights)) * blocks * mixture.block_size) < 1
    assert (mixture._draw_counts(blocks + 1) > counts).all()  # every block draws every source


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (1, 1e-4)])
def test_draws_of_a_block_are_without_replacement(weights):
    """Neighboring draws are as independent as drawing without replacement allows."""
    mixture = MixtureSampler([[100]] * len(weights), [Fraction(str(weight)) for weight in weights], 1, 1)
    sources, turns = mixture.locate_in_sources(np.arange(20 * mixture.block_size))
    for number, share in enumerate(map(float, mixture.shares)):
        drawn = sources == number
        assert (turns[drawn] == np.arange(drawn.sum())).all()
        pairs = (drawn[1:] & drawn[:-1]).mean()
        error = 5 * np.sqrt(share**2 * (1 - share**2) * 3 / len(sources)) + 2 / mixture.block_size
        assert pairs == pytest.approx(share**2, abs=error)


def test_blocks_have_different_orders():
    mixture = MixtureSampler([[5], [7]], [1, 3], 0, 1)
    sources, _ = mixture.locate_in_sources(np.arange(8 * mixture.block_size))
    assert len({tuple(block) for block in sources.reshape(8, -1)}) == 8


def test_only_the_proportion_of_weights_matters():
    positions = np.arange(5000)
    one, other = (MixtureSampler([[5], [7]], weights, 0, 1).locate(positions) for weights in ([1, 3], [2, 6]))
    assert (one.sample_id == other.sample_id).all()
