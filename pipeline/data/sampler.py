"""Which sample, when: the endless stream of samples that a run reads.

Invariant: stream position n is sample `n mod N` of epoch `n div N`, and every epoch reads each of the N
samples exactly once. The order is a pure function of (seed, window, shard sizes): it knows nothing of ranks,
workers or restarts. Global step s with global batch G takes positions [o + s G, o + (s + 1) G), where the
offset o is 0 until a part of the stream is skipped on purpose; rank r of R takes the r-th of R equal,
contiguous slices of them. So to resume is to know s and o, and to change R is to cut the same step
differently.

An epoch's order: the shards are permuted; runs of `window` consecutive ones form windows; inside a window the
samples are permuted. A larger window mixes better and reads less locally. Memory is O(shards), plus a
permutation of one window's samples for each window in use.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.data.philox import Purpose, permutation

EPOCHS_KEPT = 2  # a batch may straddle the end of an epoch
WINDOWS_KEPT = 4


class SampleLocation(NamedTuple):
    """Where the samples at some stream positions are; each field is int64 (n,)."""

    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    """Position inside the shard."""
    sample: np.ndarray
    """The sample's identity, the same in every epoch: in [0, N), in the order of the shards."""


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order, up to the permutations inside its windows."""

    shards: np.ndarray
    """(S,) shard ids in the order they are read."""
    shard_ends: np.ndarray
    """(S,) the epoch's samples up to and with each of those shards."""
    window_ends: np.ndarray
    """(W,) the epoch's samples up to and with each window."""


class ShardedSampler:
    """The stream of samples of one list of shards."""

    def __init__(self, shard_sizes: np.ndarray, seed: int, window: int, source: int = 0):
        """shard_sizes: (S,) samples in each shard, at least one sample in all; window: shards, at least 1.

        source, in [0, 2^24): streams of one seed that differ in it are independent of each other.
        """
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.seed = seed
        self.window = window
        self._items = source << 32
        self.shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1 or (self.shard_sizes < 0).any() or window < 1:
            raise ValueError("a stream needs at least one sample and a window of at least one shard")
        self._plans: OrderedDict[int, EpochOrder] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def plan(self, epoch: int) -> EpochOrder:
        """The order of an epoch's shards and windows."""
        if epoch not in self._plans:
            shards = permutation(self.seed, Purpose.SHARDS, epoch, self._items, len(self.shard_sizes))
            ends = np.cumsum(self.shard_sizes[shards])
            last_of_window = (
                np.arange(self.window, len(ends) + self.window, self.window).clip(max=len(ends)) - 1
            )
            self._plans[epoch] = EpochOrder(shards, ends, ends[last_of_window])
            while len(self._plans) > EPOCHS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """The samples at stream positions, int64 (n,), each at least 0. O(1) each, amortised."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        shard, index = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            plan = self.plan(int(epoch))
            here = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(plan.window_ends, offsets[here], side="right")
            for window in np.unique(windows):
                ids = here[windows == window]
                start = int(plan.window_ends[window - 1]) if window else 0
                size = int(plan.window_ends[window]) - start
                inside = self._window(int(epoch), int(window), size)[offsets[ids] - start] + start
                turn = np.searchsorted(plan.shard_ends, inside, side="right")
                shard[ids] = plan.shards[turn]
                index[ids] = inside - (plan.shard_ends[turn] - self.shard_sizes[shard[ids]])
        return SampleLocation(epochs, shard, index, self.shard_starts[shard] + index)

    def _window(self, epoch: int, window: int, size: int) -> np.ndarray:
        key = (epoch, window)
        if key not in self._windows:
            self._windows[key] = permutation(self.seed, Purpose.WINDOW, epoch, self._items | window, size)
            while len(self._windows) > WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]


def rank_positions(step: int, global_batch: int, rank: int, world_size: int, offset: int = 0) -> np.ndarray:
    """Stream positions that a rank takes in a global step, int64 (global_batch / world_size,).

    offset: positions that the run has skipped so far. Raises ValueError where the global batch is not a
    multiple of the world size.
    """
    share, rest = divmod(global_batch, world_size)
    if rest:
        raise ValueError(f"a global batch of {global_batch} cannot be shared evenly by {world_size} ranks")
    return np.arange(share, dtype=np.int64) + (offset + step * global_batch + rank * share)
