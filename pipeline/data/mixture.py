"""Weighted mixture of several samplers.

Invariant: the mixture is a pure function of (seed, weights), and the k-th draw of a source returns position k
of that source's own endless stream, so each epoch of a source reads each of its samples exactly once, whatever
the weights. Positions come in blocks of B. After b blocks a source was drawn b B times its share, rounded down
or up (largest remainders, Hamilton's method), so shares are exact in the long run. Within a block the draws
are permuted. B is large enough that every block draws every source.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.data.philox import Purpose, permutation
from pipeline.data.sampler import SampleLocation, ShardedSampler

MIN_BLOCK_SIZE = 4096
CACHED_BLOCKS = 4


class MixtureSampler:
    """Maps stream positions to samples of several lists of shards, with the interface of `ShardedSampler`.

    Shards and samples are numbered consecutively: those of the first source, then those of the second, and so
    on. `SampleLocation.epoch` is the epoch of the sample's source.

    Args:
        source_sizes: for each source (S_i,) samples in each shard.
        weights: one for each source, positive, with any sum; memory is O(sum / smallest weight).
        window: number of shards in a shuffle window of each source.
    """

    def __init__(self, source_sizes: Sequence[np.ndarray], weights: Sequence[Fraction], seed: int, window: int):
        self.seed = seed
        self.samplers = [ShardedSampler(sizes, seed, window, source) for source, sizes in enumerate(source_sizes)]
        self.num_samples = sum(sampler.num_samples for sampler in self.samplers)
        self.shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        self.block_size = max(MIN_BLOCK_SIZE, math.ceil(1 / min(self.shares)))
        self._first_shard = np.cumsum([0, *(len(sampler.shard_sizes) for sampler in self.samplers)])
        self._first_sample = np.cumsum([0, *(sampler.num_samples for sampler in self.samplers)])
        self._block = lru_cache(CACHED_BLOCKS)(self._draw_block)

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """Return the samples at stream positions, int64 (n,), each at least 0; amortized O(1) for each."""
        sources, turns = self.locate_in_sources(positions)
        locations = SampleLocation(*(np.empty_like(turns) for _ in SampleLocation._fields))
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            drawn = self.samplers[source].locate(turns[rows])
            locations.epoch[rows] = drawn.epoch
            locations.shard[rows] = drawn.shard + self._first_shard[source]
            locations.index_in_shard[rows] = drawn.index_in_shard
            locations.sample_id[rows] = drawn.sample_id + self._first_sample[source]
        return locations

    def locate_in_sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each position's source and its position in that source's own stream, int64 (n,) each."""
        blocks, offsets = np.divmod(np.asarray(positions, np.int64), self.block_size)
        sources, turns = np.empty_like(blocks), np.empty_like(blocks)
        for block in np.unique(blocks):
            rows = blocks == block
            block_sources, block_turns = self._block(int(block))
            sources[rows], turns[rows] = block_sources[offsets[rows]], block_turns[offsets[rows]]
        return sources, turns

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._draw_counts(block), self._draw_counts(block + 1)
        quotas = after - before
        shuffled = permutation(self.seed, Purpose.MIXTURE, 0, block, self.block_size)
        sources = np.repeat(np.arange(len(quotas)), quotas)[shuffled]
        turns = np.empty_like(sources)
        for source, (start, quota) in enumerate(zip(before, quotas, strict=True)):
            turns[sources == source] = start + np.arange(quota)
        return sources, turns

    def _draw_counts(self, num_blocks: int) -> np.ndarray:
        """Return how often the first `num_blocks` blocks draw each source, int64 (sources,)."""
        exact = [share * num_blocks * self.block_size for share in self.shares]
        counts = np.array([math.floor(value) for value in exact], np.int64)
        remainders = [math.floor(value) - value for value in exact]  # negated: the largest sorts first
        missing = num_blocks * self.block_size - int(counts.sum())
        counts[np.argsort(np.array(remainders, object), kind="stable")[:missing]] += 1
        return counts
