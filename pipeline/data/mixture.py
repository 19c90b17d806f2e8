"""Several streams in one, by weight: which source gives the sample at a position.

Invariant: the mix is a pure function of (seed, weights), and the k-th time a source is drawn it gives
position k of its own endless stream: each of its own epochs reads each of its samples exactly once, whatever
the weights. Positions come in blocks of B. After b blocks a source was drawn its share of b B times, rounded
down or up (largest remainders, Hamilton's method), so shares are exact in the long run; inside a block the
draws are permuted. B is such that every source is drawn in every block.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from pipeline.data.philox import Purpose, permutation
from pipeline.data.sampler import SampleLocation, ShardedSampler

SMALLEST_BLOCK = 4096
BLOCKS_KEPT = 4


class MixtureSampler:
    """The stream of samples of several lists of shards, with the interface of `Stream`.

    Shards and samples are numbered through: those of the first source, then those of the second, and so on.
    An epoch in `Located` is the source's own.
    """

    def __init__(
        self, source_sizes: Sequence[np.ndarray], weights: Sequence[Fraction], seed: int, window: int
    ):
        """source_sizes: for each source (S_i,) samples in each shard. weights: positive, any sum; memory
        is O(sum / least). window: shards, of each source.
        """
        self.seed = seed
        self.streams = [
            ShardedSampler(sizes, seed, window, number) for number, sizes in enumerate(source_sizes)
        ]
        self.num_samples = sum(stream.num_samples for stream in self.streams)
        self.shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        self.block = max(SMALLEST_BLOCK, math.ceil(1 / min(self.shares)))
        shards = [len(stream.shard_sizes) for stream in self.streams]
        samples = [stream.num_samples for stream in self.streams]
        self._first_shard = np.cumsum([0, *shards])
        self._first_sample = np.cumsum([0, *samples])
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """The samples at stream positions, int64 (n,), each at least 0. O(1) each, amortised."""
        source, turn = self.draws(positions)
        locations = SampleLocation(*(np.empty_like(turn) for _ in SampleLocation._fields))
        for number in np.unique(source):
            rows = np.flatnonzero(source == number)
            own = self.streams[number].locate(turn[rows])
            locations.epoch[rows] = own.epoch
            locations.shard[rows] = own.shard + self._first_shard[number]
            locations.index[rows] = own.index
            locations.sample[rows] = own.sample + self._first_sample[number]
        return locations

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each position draws, and which position of that source's own stream; int64 (n,)."""
        blocks, offsets = np.divmod(np.asarray(positions, np.int64), self.block)
        source, turn = np.empty_like(blocks), np.empty_like(blocks)
        for block in np.unique(blocks):
            here = blocks == block
            sources, turns = self._block(int(block))
            source[here], turn[here] = sources[offsets[here]], turns[offsets[here]]
        return source, turn

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._blocks:
            before, after = self._drawn(block), self._drawn(block + 1)
            quotas = after - before
            shuffled = permutation(self.seed, Purpose.MIXTURE, 0, block, self.block)
            sources = np.repeat(np.arange(len(quotas)), quotas)[shuffled]
            turns = np.empty_like(sources)
            for number, (start, quota) in enumerate(zip(before, quotas, strict=True)):
                turns[sources == number] = start + np.arange(quota)
            self._blocks[block] = sources, turns
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _drawn(self, blocks: int) -> np.ndarray:
        """How often each source is drawn in the first `blocks` blocks, int64 (sources,)."""
        exact = [share * blocks * self.block for share in self.shares]
        drawn = np.array([math.floor(value) for value in exact], np.int64)
        remainders = [math.floor(value) - value for value in exact]  # negative: the largest comes first
        left = blocks * self.block - int(drawn.sum())
        drawn[np.argsort(np.array(remainders, object), kind="stable")[:left]] += 1
        return drawn
