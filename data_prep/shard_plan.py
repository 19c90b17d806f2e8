"""Which input goes into which shard, decided before any image is looked at.

Invariant: the plan is a pure function of (samples, seed, shard size). Samples are ordered by a keyed hash of
their keys: a shuffle of the whole set that needs no random state, and that puts equal keys side by side. So
each shard can be built alone, anywhere, any number of times, with the same result; an input that turns out to
be bad makes its own shard smaller and touches no other.

Columns instead of objects: 14 million samples take about 1.3 GB.
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_prep.shard_file import BLOCK
from data_prep.sources.sample import Location, Sample, Storage

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".avif")
"""Only of files that would have one key do these decide, which of them is read."""
_STORAGES = tuple(Storage)


@dataclass(frozen=True, slots=True)
class ShardSize:
    """Exactly one is set. bytes: of the source's images with tar headers, so that the shard's own size
    differs where images are re-encoded."""

    samples: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input that is not read at all. reason: "code: detail"."""

    location: Location
    reason: str


class _Texts:
    """Many short strings in one buffer."""

    def __init__(self):
        self._bytes = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __getitem__(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._bytes[start : self._ends[row]].decode("utf-8", "surrogateescape")

    def feed(self, digest) -> None:
        digest.update(self._bytes)
        digest.update(self._ends)


class ShardPlan:
    """rows: one per sample in the source's order. order: row numbers in the order of the shards, (n,) uint32.
    bounds: shard i holds order[bounds[i] : bounds[i + 1]]. refused: inputs that are in no shard."""

    def __init__(self, samples: Iterable[Sample], seed: int, shard_size: ShardSize):
        self.seed = seed
        self.rejected: list[Rejected] = []
        self._keys, self._members, self._containers = _Texts(), _Texts(), _Texts()
        self._container, self._offset, self._size = array("I"), array("Q"), array("Q")
        self._label, self._storage = array("i"), array("B")
        self.order = self._shuffled(self._append_all(samples))
        self.bounds = self._cut(shard_size)
        self.sha256 = self._digest(shard_size)

    @property
    def num_inputs(self) -> int:
        return len(self.order) + len(self.rejected)

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def source_bytes(self) -> int:
        return int(np.asarray(self._size)[self.order].sum())

    def shard_inputs(self, shard: int) -> int:
        return int(self.bounds[shard + 1] - self.bounds[shard])

    def shard_bytes(self, shard: int, image_limit: int | None = None) -> int:
        """Of its tar file, metadata aside, if every image passes through, or takes image_limit bytes at
        most."""
        rows = self.order[self.bounds[shard] : self.bounds[shard + 1]]
        sizes = np.asarray(self._size)[rows].astype(np.int64)
        if image_limit is not None:
            sizes = np.minimum(sizes, image_limit)
        labels = int((np.asarray(self._label)[rows] >= 0).sum())
        return int((BLOCK + -(-sizes // BLOCK) * BLOCK).sum()) + 2 * BLOCK * (labels + 1)

    def shard(self, shard: int) -> Iterable[Sample]:
        """The samples of one shard, in its order."""
        for row in self.order[self.bounds[shard] : self.bounds[shard + 1]].tolist():
            yield self._sample(row)

    def _append_all(self, samples: Iterable[Sample]) -> np.ndarray:
        """Fills the columns. Returns a hash per row, (n,) uint64."""
        hashes = array("Q")
        seed = hashlib.sha256(str(self.seed).encode()).digest()
        container = None
        for sample in samples:
            location = sample.location
            if sample.rejection_reason is not None:
                self.rejected.append(Rejected(location, sample.rejection_reason))
                continue
            if location.storage == Storage.FILE:
                member = (
                    location.container
                )  # a container for each file would be a column of millions for nothing
            else:
                member = location.member
                if location.container != container:
                    container = location.container
                    self._containers.append(container)
            self._keys.append(sample.key)
            self._members.append(member)
            self._container.append(max(0, len(self._containers) - 1))
            self._offset.append(location.offset)
            self._size.append(location.size)
            self._label.append(sample.label)
            self._storage.append(location.storage)
            digest = hashlib.blake2b(sample.key.encode(), digest_size=8, key=seed).digest()
            hashes.append(int.from_bytes(digest, "little"))
        return np.array(hashes, np.uint64)

    def _shuffled(self, hashes: np.ndarray) -> np.ndarray:
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        ordered = hashes[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        dropped, held, previous = [], {}, -1  # held: key to position, of those with one hash
        for position in repeated.tolist():
            if position - 1 != previous:  # a new run of equal hashes: equal keys, or a rare collision
                held = {self._keys[int(order[position - 1])]: position - 1}
            previous, row = position, int(order[position])
            key = self._keys[row]
            if held.setdefault(key, position) == position:
                continue
            winner, loser = held[key], position
            if self._named_like_image(row) and not self._named_like_image(int(order[winner])):
                winner, loser = loser, winner  # a photograph does not give way to its caption
            held[key] = winner
            twin = self._sample(int(order[winner])).location
            reason = f"duplicate_key: its key {key!r} is that of {twin}"
            self.rejected.append(Rejected(self._sample(int(order[loser])).location, reason))
            dropped.append(loser)
        return np.delete(order, dropped)

    def _named_like_image(self, row: int) -> bool:
        return str(self._sample(row).location).lower().endswith(IMAGE_ENDINGS)

    def _cut(self, shard_size: ShardSize) -> np.ndarray:
        count = len(self.order)
        if shard_size.samples is not None:
            return np.append(np.arange(0, count, shard_size.samples, dtype=np.int64), count)
        sizes = np.asarray(self._size)[self.order].astype(np.int64)
        ends = np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK)
        bounds = [0]
        while bounds[-1] < count:
            used = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
            bounds.append(
                max(bounds[-1] + 1, int(np.searchsorted(ends, used + shard_size.bytes, side="right")))
            )
        return np.array(bounds, np.int64)

    def _sample(self, row: int) -> Sample:
        storage, container, member = _STORAGES[self._storage[row]], self._members[row], ""
        if storage is not Storage.FILE:
            container, member = self._containers[self._container[row]], container
        location = Location(container, member, self._offset[row], self._size[row], storage)
        return Sample(self._keys[row], location, self._label[row])

    def _digest(self, shard_size: ShardSize) -> str:
        digest = hashlib.sha256(f"{self.seed} {shard_size} {len(self.rejected)} {len(self._label)}".encode())
        for texts in (self._keys, self._members, self._containers):
            texts.feed(digest)
        for column in (self._container, self._offset, self._size, self._label, self._storage):
            digest.update(column)
        return digest.hexdigest()
