"""Random samples of anchors and proposals without a random generator.

Invariant: a sample is a function of the key of its image and of the candidates of that image alone, on any device.
"""

import torch

MASK32 = 0xFFFFFFFF


def hash_uniform(key: torch.Tensor, count: int, stream: int) -> torch.Tensor:
    """Return random numbers (count,), int64 in [0, 2^32), by index: MurmurHash3's finalizer of key and index.

    Args:
        key: Two numbers in [0, 1), float32 (2,), multiples of 2^-24.
        stream: Different streams of the same key are independent.
    """
    high, low = (key.double() * 2**24).long().unbind()
    index = torch.arange(count, device=key.device)
    return _mix(_mix(_mix(index + stream * 0x9E3779B9) ^ high) ^ low)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = bits & MASK32
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & MASK32
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & MASK32
    return bits ^ (bits >> 16)


class StatelessSampler:
    """Samples positive and negative candidates like torchvision's BalancedPositiveNegativeSampler.

    Args:
        size: Candidates to sample per image.
        positive_fraction: Largest share of positive ones.
        stream: As for `hash_uniform`.
    """

    def __init__(self, size: int, positive_fraction: float, stream: int):
        self.size, self.positive_fraction, self.stream = size, positive_fraction, stream
        self.keys = torch.empty(0, 2)
        """(B, 2) keys of the images of the next call; see `hash_uniform`."""

    def __call__(self, labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return masks of the sampled positive (label >= 1) and negative (label 0) candidates of each image."""
        positives, negatives = [], []
        for key, of_image in zip(self.keys, labels, strict=True):
            numbers = hash_uniform(key, len(of_image), self.stream)
            positive = _smallest(numbers, of_image >= 1, int(self.size * self.positive_fraction))
            negative = _smallest(numbers, of_image == 0, self.size - int(positive.sum()))
            positives.append(positive)
            negatives.append(negative)
        return positives, negatives


def _smallest(numbers: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the `count` allowed candidates with the smallest numbers, or of all if there are fewer."""
    candidates = torch.where(allowed)[0]
    chosen = candidates[numbers[candidates].argsort(stable=True)[:count]]
    return torch.zeros_like(allowed).index_fill_(0, chosen, True)
