"""Parts of a shard set, chosen by a hash of the samples' keys.

Invariant: whether a sample belongs to a part depends on its key and the share alone, so it survives another
shard size, another seed of the build and samples that come or go; and a smaller share lies inside a larger
one. The sample held out is the same whatever the subset that is trained on. A share of every class depends on
the other samples of the class too.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

Split = Literal["training", "held_out"]


def select_split(
    keys: Sequence[str], part: Split, subset: float, holdout: float, labels: np.ndarray | None = None
) -> np.ndarray:
    """Which samples belong to a part, bool (n,).

    held_out: the share `holdout` of all samples. training: of the others, the share `subset`. With labels
    (n,), of all samples there are, it is that share of every class, to the nearest sample and at least one:
    as few labels are given in the literature (SimCLR's 1 % and 10 % of ImageNet).
    """
    held_out = _hashes(keys, b"holdout") < holdout
    if part == "held_out":
        return held_out
    hashes = _hashes(keys, b"subset")
    if labels is None:
        return ~held_out & (hashes < subset)
    order = np.lexsort((hashes, labels))
    order = order[~held_out[order]]
    classes = labels[order]
    sizes = np.bincount(classes)
    place = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[classes]
    wanted = np.maximum(1, np.rint(subset * sizes))
    chosen = np.zeros(len(keys), bool)
    chosen[order[place < wanted[classes]]] = True
    return chosen


def empty_split_error(part: Split, subset: float, holdout: float, places: str) -> str:
    """What to do where a part has no sample of `places`, in a line."""
    if part == "held_out":
        return f"data.holdout: {holdout:g} leaves no sample of {places} to be held out; give a larger share"
    if subset < 1:
        return f"data.subset: {subset:g} leaves no sample of {places}; give a larger share"
    return f"data.holdout: {holdout:g} leaves no sample of {places} to learn from; give a smaller share"


def _hashes(keys: Sequence[str], purpose: bytes) -> np.ndarray:
    """A number in [0, 1) a key, float64 (n,), another one for each purpose."""
    blake = hashlib.blake2b(digest_size=8, person=purpose)
    digests = bytearray()
    for key in keys:
        copy = blake.copy()
        copy.update(key.encode())
        digests += copy.digest()
    return (np.frombuffer(bytes(digests), ">u8") >> np.uint64(11)) * 2.0**-53
