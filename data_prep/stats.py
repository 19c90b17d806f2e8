"""Statistics of the samples of a build, for the card and the manifest.

Invariant: a set's statistics are the sum of its shards' in any order, so each shard stores its own.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from data_prep.images import Prepared

SHORTER_SIDE_EDGES = (64, 128, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
"""Pixels; a bin is named by its lower edge, which belongs to it."""
KILOBYTE_EDGES = (4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
ASPECT_EDGES = (0.25, 0.5, 0.67, 0.75, 0.9, 1.1, 1.33, 1.5, 2.0, 4.0)
"""Width / height."""


@dataclass
class Stats:
    """Number of samples (in `quarantine` of inputs) per bin; keys are strings, as in JSON."""

    shorter_side: Counter = field(default_factory=Counter)
    kilobytes: Counter = field(default_factory=Counter)
    aspect: Counter = field(default_factory=Counter)
    color: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    quarantine: Counter = field(default_factory=Counter)
    unreadable: Counter = field(default_factory=Counter)  # damaged rows and values of metadata, left out

    def add(self, image: Prepared, num_bytes: int, labels: Iterable[int]) -> None:
        """Count a sample whose image has `num_bytes`, and its classes."""
        self.shorter_side[_bin(min(image.width, image.height), SHORTER_SIDE_EDGES)] += 1
        self.kilobytes[_bin(num_bytes / 1000, KILOBYTE_EDGES)] += 1
        self.aspect[_bin(image.width / image.height, ASPECT_EDGES)] += 1
        self.color["grey" if image.gray else "RGB"] += 1
        if image.repairs:
            self.repairs.update(image.repairs)
        self.labels.update(map(str, labels))

    def merge(self, other: "Stats") -> None:
        for item in fields(self):
            getattr(self, item.name).update(getattr(other, item.name))

    def to_json(self) -> dict[str, dict[str, int]]:
        return {item.name: dict(sorted(getattr(self, item.name).items())) for item in fields(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Stats":
        return cls(**{item.name: Counter(document[item.name]) for item in fields(cls)})


def _bin(value: float, edges: tuple[float, ...]) -> str:
    return str((0, *edges)[bisect_right(edges, value)])
