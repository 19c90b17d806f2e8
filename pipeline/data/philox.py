"""Counter-based random numbers: each is a pure function of (seed, purpose, epoch, item, index).

Invariant: a random number does not depend on call order, world size or restarts. The generator is Philox4x32-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), which CUDA and PyTorch use on GPUs. It is
implemented here because the streams of numpy's Generator may change with numpy's version, and a run must be
able to resume after an upgrade.
"""

from enum import IntEnum

import numpy as np

ROUNDS = 10
MULTIPLIER = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


class Purpose(IntEnum):
    """Use of a random number. Existing runs depend on the values: never renumber them."""

    SHARDS = 0
    WINDOW = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    MIXTURE = 5
    COLOR = 6


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Map counters (..., 4) of 32-bit words and a 64-bit key to (..., 4) random uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIER[0], c2 * MULTIPLIER[1]
        c0, c1, c2, c3 = ((product1 >> HALF) ^ c1 ^ k0, product1 & LOW, (product0 >> HALF) ^ c3 ^ k1, product0 & LOW)
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(seed: int, purpose: Purpose, epoch: int | np.ndarray, item: int | np.ndarray, count: int) -> np.ndarray:
    """Return random uint32 (..., count), where (...) is the broadcast shape of epoch and item.

    Args:
        seed: in [0, 2^64). epoch: in [0, 2^32). item: in [0, 2^56).
    """
    epoch, item = np.broadcast_arrays(np.asarray(epoch, np.uint64), np.asarray(item, np.uint64))
    blocks = -(-count // 4)
    counter = np.empty((*item.shape, blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = (item & LOW)[..., None]
    counter[..., 2] = epoch[..., None]
    counter[..., 3] = ((item >> HALF) << np.uint64(8) | np.uint64(purpose))[..., None]
    return philox(counter, seed).reshape(*item.shape, blocks * 4)[..., :count]


def uniform(seed: int, purpose: Purpose, epoch: int | np.ndarray, item: int | np.ndarray, count: int) -> np.ndarray:
    """Return float32 (..., count) in [0, 1), multiples of 2^-24; arguments as for `random_bits`."""
    bits = random_bits(seed, purpose, epoch, item, count)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def permutation(seed: int, purpose: Purpose, epoch: int, item: int, size: int) -> np.ndarray:
    """Return a random permutation of range(size), int64: the argsort of `size` random 64-bit numbers."""
    bits = random_bits(seed, purpose, epoch, item, 2 * size).astype(np.uint64)
    return np.argsort(bits[0::2] << HALF | bits[1::2], kind="stable")
