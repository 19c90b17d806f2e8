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
def test_every_epoch_of_every_source_reads_each_of_its_samples_once(mixture, count):
    locations = mixture.locate(np.arange(count))
    first = 0
    for stream in mixture.streams:
        size = stream.num_samples
        own = (locations.sample >= first) & (locations.sample < first + size)
        samples, epochs = locations.sample[own] - first, locations.epoch[own]
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert (epochs == np.arange(len(samples)) // size).all()
        first += size


@settings(deadline=None)
@given(mixtures())
def test_a_samples_identity_is_its_place_among_all_sources(mixture):
    shard_sizes = np.concatenate([stream.shard_sizes for stream in mixture.streams])
    starts = np.cumsum(shard_sizes) - shard_sizes
    locations = mixture.locate(np.arange(500))
    assert (locations.sample == starts[locations.shard] + locations.index).all()
    assert (locations.index < shard_sizes[locations.shard]).all()


@example([165, 1, 1, 733], 62385)  # one share is a whole number: it must not be rounded up
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**6))
def test_after_any_number_of_blocks_every_source_was_drawn_its_share_to_less_than_one(weights, blocks):
    mixture = MixtureSampler([[1]] * len(weights), weights, 0, 1)
    drawn = mixture._drawn(blocks)
    assert drawn.sum() == blocks * mixture.block
    for count, weight in zip(drawn.tolist(), weights, strict=True):
        assert abs(count - Fraction(weight, sum(weights)) * blocks * mixture.block) < 1
    assert (mixture._drawn(blocks + 1) > drawn).all()  # every source in every block


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (1, 1e-4)])
def test_inside_a_block_the_draws_are_those_of_an_urn(weights):
    """Neighbouring draws are as independent as drawing without replacement leaves them."""
    mixture = MixtureSampler([[100]] * len(weights), [Fraction(str(weight)) for weight in weights], 1, 1)
    source, turn = mixture.draws(np.arange(20 * mixture.block))
    for number, share in enumerate(map(float, mixture.shares)):
        drawn = source == number
        assert (turn[drawn] == np.arange(drawn.sum())).all()
        pairs = (drawn[1:] & drawn[:-1]).mean()
        error = 5 * np.sqrt(share**2 * (1 - share**2) * 3 / len(source)) + 2 / mixture.block
        assert pairs == pytest.approx(share**2, abs=error)


def test_no_two_blocks_draw_in_the_same_order():
    mixture = MixtureSampler([[5], [7]], [1, 3], 0, 1)
    source, _ = mixture.draws(np.arange(8 * mixture.block))
    assert len({tuple(block) for block in source.reshape(8, -1)}) == 8


def test_weights_are_proportions():
    positions = np.arange(5000)
    one, other = (MixtureSampler([[5], [7]], weights, 0, 1).locate(positions) for weights in ([1, 3], [2, 6]))
    assert (one.sample == other.sample).all()
