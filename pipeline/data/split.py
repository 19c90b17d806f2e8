"""Subset and holdout of a shard set, selected by a hash of the sample keys.

Invariant: a sample's membership depends only on its key and the share, so it survives another shard size,
another build seed and added or removed samples. A smaller share is contained in a larger one, and the holdout
is the same for every subset. With class-balanced subsets, membership also depends on the rest of the class.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

Split = Literal["training", "held_out"]


def select_split(
    keys: Sequence[str], split: Split, subset: float, holdout: float, labels: np.ndarray | None = None
) -> np.ndarray:
    """Select the samples of a split.

    Args:
        split: "held_out" is the share `holdout` of all samples, "training" the share `subset` of the others.
        labels: (n,) classes of all samples. Then "training" is the share `subset` of each class, to the
            nearest sample and at least one (as SimCLR's 1 % and 10 % of ImageNet).

    Returns:
        bool (n,).
    """
    held_out = _hash_keys(keys, b"holdout") < holdout
    if split == "held_out":
        return held_out
    hashes = _hash_keys(keys, b"subset")
    if labels is None:
        return ~held_out & (hashes < subset)
    order = np.lexsort((hashes, labels))
    order = order[~held_out[order]]
    classes = labels[order]
    class_sizes = np.bincount(classes)
    rank_in_class = np.arange(len(order)) - (np.cumsum(class_sizes) - class_sizes)[classes]
    quotas = np.maximum(1, np.rint(subset * class_sizes))
    selected = np.zeros(len(keys), bool)
    selected[order[rank_in_class < quotas[classes]]] = True
    return selected


def _hash_keys(keys: Sequence[str], purpose: bytes) -> np.ndarray:
    """Hash each key to [0, 1), float64 (n,), independently for each purpose."""
    blake = hashlib.blake2b(digest_size=8, person=purpose)
    digests = bytearray()
    for key in keys:
        copy = blake.copy()
        copy.update(key.encode())
        digests += copy.digest()
    return (np.frombuffer(bytes(digests), ">u8") >> np.uint64(11)) * 2.0**-53
