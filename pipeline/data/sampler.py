"""Sampler: the endless, deterministic stream of samples of a run.

Invariant: stream position n is sample `n mod N` of epoch `n div N`, and every epoch reads each of the N
samples exactly once. The order is a pure function of (seed, window, shard sizes); ranks, workers and restarts
do not affect it. Global step s with global batch G covers positions [o + s G, o + (s + 1) G), where the offset
o is 0 until a rollback skips a part of the stream; rank r of R takes the r-th of R equal, contiguous slices.
The resume state is therefore (s, o), and another world size only slices the same step differently.

Order of an epoch: the shards are permuted, every `window` consecutive shards form a window, and the samples of
each window are permuted. A larger window mixes better and reads less locally. Memory is O(shards), plus one
permutation for each window in use.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.data.philox import Purpose, permutation

CACHED_EPOCHS = 2  # a batch may span the end of an epoch
CACHED_WINDOWS = 4


class SampleLocation(NamedTuple):
    """Locations of the samples at some stream positions; each field is int64 (n,)."""

    epoch: np.ndarray
    shard: np.ndarray
    index_in_shard: np.ndarray
    sample_id: np.ndarray
    """Identity of the sample, the same in every epoch: in [0, N), in the order of the shards."""


@dataclass(frozen=True)
class EpochOrder:
    """Order of one epoch, without the permutations inside its windows."""

    shards: np.ndarray
    """(S,) shards in reading order."""
    shard_ends: np.ndarray
    """(S,) cumulative number of samples after each of these shards."""
    window_ends: np.ndarray
    """(W,) cumulative number of samples after each window."""


class ShardedSampler:
    """Maps stream positions to samples of a list of shards.

    Args:
        shard_sizes: (S,) samples in each shard; at least one sample in total.
        window: number of shards in a shuffle window, at least 1.
        source: in [0, 2^24); samplers of the same seed with different sources are independent.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, window: int, source: int = 0):
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.seed = seed
        self.window = window
        self._first_item = source << 32
        self.shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1 or (self.shard_sizes < 0).any() or window < 1:
            raise ValueError("a sampler needs at least one sample and a window of at least one shard")
        self.epoch_order = lru_cache(CACHED_EPOCHS)(self._epoch_order)
        self._window = lru_cache(CACHED_WINDOWS)(self._permute_window)

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """Return the samples at stream positions, int64 (n,), each at least 0; amortized O(1) for each."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        shard, index = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            order = self.epoch_order(int(epoch))
            epoch_rows = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(order.window_ends, offsets[epoch_rows], side="right")
            for window in np.unique(windows):
                rows = epoch_rows[windows == window]
                start = int(order.window_ends[window - 1]) if window else 0
                size = int(order.window_ends[window]) - start
                shuffled = self._window(int(epoch), int(window), size)[offsets[rows] - start] + start
                turn = np.searchsorted(order.shard_ends, shuffled, side="right")
                shard[rows] = order.shards[turn]
                index[rows] = shuffled - (order.shard_ends[turn] - self.shard_sizes[shard[rows]])
        return SampleLocation(epochs, shard, index, self.shard_starts[shard] + index)

    def _epoch_order(self, epoch: int) -> EpochOrder:
        shards = permutation(self.seed, Purpose.SHARDS, epoch, self._first_item, len(self.shard_sizes))
        ends = np.cumsum(self.shard_sizes[shards])
        last_shards = np.arange(self.window, len(ends) + self.window, self.window).clip(max=len(ends)) - 1
        return EpochOrder(shards, ends, ends[last_shards])

    def _permute_window(self, epoch: int, window: int, size: int) -> np.ndarray:
        return permutation(self.seed, Purpose.WINDOW, epoch, self._first_item | window, size)


def rank_positions(step: int, global_batch: int, rank: int, world_size: int, offset: int = 0) -> np.ndarray:
    """Return the stream positions of a rank in a global step, int64 (global_batch / world_size,).

    Args:
        offset: stream positions that the run has skipped so far.

    Raises:
        ValueError: If the global batch is not a multiple of the world size.
    """
    per_rank, remainder = divmod(global_batch, world_size)
    if remainder:
        raise ValueError(f"a global batch of {global_batch} cannot be shared evenly by {world_size} ranks")
    return np.arange(per_rank, dtype=np.int64) + (offset + step * global_batch + rank * per_rank)
