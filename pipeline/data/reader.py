"""The bytes of a sample: the only door from the loader to the shard sets.

Invariant: what is read is the file that the manifest promises, or there is a `UserError` that names shard and
sample. Indexes are checked against the manifest's checksum when they are used, and every image against the
tar header before it, so a shard that was truncated or replaced under a running job is found out when it is
read. Any number of threads may read at once.

Several sets are numbered through: the shards of the first, then those of the second, and so on. Where
`data.subset` or `data.holdout` choose, a shard's samples are those chosen: nobody outside this file sees the
others.
"""

import hashlib
import json
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.shard_set import (
    MANIFEST,
    Manifest,
    Shard,
    ShardIndex,
    ShardSetError,
    check_shard_bytes,
    check_shard_files,
    idx_path,
    is_header_of,
    parse_manifest,
    read_manifest,
    tar_path,
    verified_index,
)
from pipeline.data.cache import CachedShard, ShardCache
from pipeline.data.mixture import MixtureSampler
from pipeline.data.retry import RateLimitedWarnings, retry_with_timeout
from pipeline.data.sampler import ShardedSampler
from pipeline.data.split import Split, empty_split_error, select_split
from pipeline.data.storage import LocalStorage, Span, Storage, coalesced, open_storage
from pipeline.errors import UserError
from pipeline.recipe.sections import FIRST_WAIT, DataSection, RetryPolicy, Source

HEADER = 512
CHECKED_BYTES = 4 * 2**30  # some seconds of reading
SLOW_START = 5.0  # seconds


def check_sources(sources: Sequence[Source]) -> None:
    """UserError where a directory is no finished shard set. Cheap: reads manifests, and nothing behind a
    URL."""
    for source in sources:
        storage = open_storage(source.path)
        if isinstance(storage, LocalStorage):
            try:
                read_manifest(storage.directory)
            except ShardSetError as error:
                raise UserError(str(error)) from None


class ShardSet(NamedTuple):
    storage: Storage
    manifest: Manifest


class ShardReader:
    """Reads single samples of shard sets, in any order, holding a bounded number of shards open."""

    def __init__(
        self,
        sources: str | Path | Sequence[Source],
        data: DataSection | None = None,
        part: Split = "training",
        first_wait_s: float = FIRST_WAIT,
    ):
        """sources: one set, or several. data: how to read them, its subset and its holdout; part: which of
        the two parts that these make; first_wait_s: seconds before a read is tried a second time.

        Raises UserError where a set is missing, unfinished or damaged, or the part is empty.
        """
        if isinstance(sources, str | Path):
            sources = [Source(path=str(sources))]
        self.sources, self.data, self.part = sources, data or DataSection(), part
        self._closed = threading.Event()
        self._patience = RetryPolicy(self.data.timeout_s, self.data.retries, first_wait_s)
        self._warn = RateLimitedWarnings()
        self._cache = self._open_cache()
        self.sets = [self._open_set(source.path) for source in sources]
        self._check_cache()
        self._check_different()
        self._shards = [(place, shard) for place in self.sets for shard in place.manifest.shards]
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._indexes_kept = 4 + 2 * self.data.shuffle_window_shards * len(self.sets)
        self._lock = threading.Lock()
        self.shard_sizes = np.array([shard.samples for _, shard in self._shards], np.int64)
        """(S,) samples in each shard."""
        self._chosen: list[np.ndarray] | None = None
        if self.data.subset < 1 or self.data.holdout > 0 or part == "held_out":
            self._choose()

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def manifest(self) -> Manifest:
        """The manifest of the set. UserError where there are several: classes are a single set's."""
        if len(self.sets) > 1:
            raise UserError(f"{', '.join(self.places)}: one shard set is needed here, these are several")
        return self.sets[0].manifest

    @property
    def places(self) -> list[str]:
        """The sets' directories or URLs."""
        return [place.storage.place for place in self.sets]

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: a digest of the shards' checksums, in order, and of the
        sources' shares, the subset and the holdout where there are any."""
        content = "".join(shard.sha256 for _, shard in self._shards)
        weights = self._weights()
        if weights or self._chosen is not None:
            shards = [len(place.manifest.shards) for place in self.sets]
            shares = [str(weight / sum(weights)) for weight in weights]
            chosen = [self.part, self.data.subset, self.data.holdout]
            content += json.dumps([shards, shares, *chosen, *["by class"] * self.data.subset_by_class])
        return hashlib.sha256(content.encode()).hexdigest()

    def described(self) -> list[dict]:
        """What each set is, for the record: where it lies, whose images it has, and how many of all are
        read."""
        return [
            {
                "path": place.storage.place,
                "source": place.manifest.source,
                "split": place.manifest.split,
                "samples": int(sizes.sum()),
                "of": place.manifest.num_samples,
            }
            for place, sizes in zip(self.sets, self._sizes_by_set(), strict=True)
        ]

    def stream(self, seed: int) -> ShardedSampler | MixtureSampler:
        """The order in which these samples are read."""
        window = self.data.shuffle_window_shards
        if not self._weights():
            return ShardedSampler(self.shard_sizes, seed, window)
        return MixtureSampler(self._sizes_by_set(), self._weights(), seed, window)

    def check_bytes(self, part: int, num_parts: int) -> str | None:
        """Compare every `num_parts`-th shard, from the `part`-th, with its checksum. UserError at a fault.

        Returns None, or what was not checked and how to do it: sets behind a URL, and everything where a part
        is more than `CHECKED_BYTES`, because that would delay the start.
        """
        local = [(place.storage.directory, shard) for place, shard in self._shards if _is_local(place)]
        if sum(shard.bytes for _, shard in local) > CHECKED_BYTES * num_parts:
            directories = dict.fromkeys(directory for directory, _ in local)
            commands = ", ".join(f"`python -m data_prep verify {directory}`" for directory in directories)
            return f"too much data to check here; this does it: {commands}"
        for directory, shard in local[part::num_parts]:
            try:
                check_shard_bytes(directory, shard)
            except ShardSetError as error:
                raise UserError(str(error)) from None
        if len(local) < len(self._shards):
            return "sets behind a URL are not checked at the start; with data.cache_dir each shard is, once"
        return None

    def read(self, shard: int, index: int) -> np.ndarray:
        """The encoded image of one sample, uint8 (bytes,)."""
        return self.read_many(shard, [index])[0]

    def read_many(self, shard: int, indexes: Sequence[int]) -> list[np.ndarray]:
        """The encoded images of samples of one shard, uint8 (bytes,) each. Cheapest in ascending order:
        neighbours are read at once."""
        place, entry = self._shards[shard]
        index = self._index(shard)
        starts = index.offsets[indexes] - HEADER
        ends = index.offsets[indexes] + index.sizes[indexes]
        gap = LocalStorage.gap if self._cache else place.storage.gap
        spans, rows = coalesced(starts.tolist(), ends.tolist(), gap)
        parts = self._read(place, entry, spans)
        images = []
        for row, start, end in zip(rows, starts.tolist(), ends.tolist(), strict=True):
            part, offset = parts[row], spans[row][0]
            key = index.keys[indexes[len(images)]]
            body = start + HEADER - offset
            if not is_header_of(part[start - offset : body], f"{key}.jpg", end - start - HEADER):
                raise UserError(
                    f"{self.name(shard)}: no longer holds sample {key!r} where its index says: the file was "
                    f"replaced; {self.repair_hint(shard)}"
                )
            image = np.frombuffer(part, np.uint8, end - offset - body, body)
            images.append(image if len(part) == end - start else image.copy())  # let go of the neighbours
        return images

    def labels(self, shard: int) -> np.ndarray | None:
        """The classes of a shard's samples, int64 (n,): positions in its manifest's `classes`; None where
        that is empty."""
        place, entry = self._shards[shard]
        if not place.manifest.classes:
            return None
        index = self._chosen_index(shard, "cls")
        starts, ends = index.offsets.tolist(), (index.offsets + index.sizes).tolist()
        spans, rows = coalesced(starts, ends, LocalStorage.gap if self._cache else place.storage.gap)
        parts = self._read(place, entry, spans)
        texts = [
            parts[row][start - spans[row][0] : end - spans[row][0]]
            for row, start, end in zip(rows, starts, ends, strict=True)
        ]
        try:
            return np.array([int(text) for text in texts], np.int64)
        except ValueError:
            raise UserError(f"{self.name(shard)}: a label is no number; {self.repair_hint(shard)}") from None

    def mean_bytes(self, shard: int) -> int:
        """Of a sample of the shard, from the manifest alone, tar headers included."""
        entry = self._shards[shard][1]
        return -(-entry.bytes // entry.samples)

    def key(self, shard: int, index: int) -> str:
        """The sample's key in its shard set."""
        return self._index(shard).keys[index]

    def name(self, shard: int) -> str:
        """The shard's file or URL, for messages."""
        place, entry = self._shards[shard]
        return f"{place.storage.place}/{entry.name}.tar"

    def repair_hint(self, shard: int) -> str:
        """What to do about a damaged shard, for messages."""
        place = self._shards[shard][0]
        if _is_local(place):
            return f"run `python -m data_prep verify {place.storage.place}` and build the shard set anew"
        return "run `python -m data_prep verify` where the set was built and upload it anew"

    def close(self) -> None:
        """Ends what is being read: whoever waits for it gets `patience.Stopped`."""
        self._closed.set()

    def reopen(self) -> None:
        """Read on, after `close`, when nobody reads any more."""
        self._closed.clear()

    def _open_set(self, path: str) -> ShardSet:
        storage = open_storage(path)
        try:
            if isinstance(storage, LocalStorage):
                manifest = read_manifest(storage.directory)
                check_shard_files(storage.directory, manifest)
            else:
                where = f"{storage.place}/{MANIFEST}"
                data = self._patiently(where, lambda heartbeat: storage.read_file(MANIFEST, heartbeat))
                manifest = parse_manifest(data, where)
        except ShardSetError as error:
            raise UserError(str(error)) from None
        return ShardSet(storage, manifest)

    def _check_different(self) -> None:
        """UserError where two sources are the same set, by content, however their paths are spelt."""
        places: dict[tuple[str, ...], str] = {}
        for shard_set in self.sets:
            content = tuple(shard.sha256 for shard in shard_set.manifest.shards)
            place = str(shard_set.storage.place)
            if content in places:
                raise UserError(
                    f"{places[content]} and {place} are the same shard set; leave one of them out"
                )
            places[content] = place

    def _open_cache(self) -> ShardCache | None:
        data = self.data
        if data.cache_dir is None:
            return None
        return ShardCache(
            data.cache_dir, int(data.cache_gb * 1e9), 2 * data.shuffle_window_shards, self._closed
        )

    def _check_cache(self) -> None:
        """UserError where the cache holds less than the shards of a window: each would be fetched for nearly
        every sample."""
        if self._cache is None:
            return
        sizes = [
            sorted((shard.bytes for shard in place.manifest.shards), reverse=True) for place in self.sets
        ]
        least = sum(sum(of_set[: self.data.shuffle_window_shards]) for of_set in sizes)
        if least > self.data.cache_gb * 1e9:
            raise UserError(
                f"data.cache_gb: {self.data.cache_gb:g} is less than the {least / 1e9:.3g} GB of the shards "
                "that are read at a time; raise it, or lower data.shuffle_window_shards"
            )

    def _read(self, place: ShardSet, shard: Shard, spans: Sequence[Span]) -> list[bytes]:
        name = tar_path("", shard).name
        where = f"{place.storage.place}/{name}"

        def read(spans: Sequence[Span]) -> list[bytes]:
            return self._patiently(where, lambda heartbeat: place.storage.read(name, spans, heartbeat))

        if self._cache is None:
            return read(spans)
        original = CachedShard(where, shard.sha256, shard.bytes, lambda *span: read([span])[0])
        return self._cache.read(original, spans)

    def _choose(self) -> None:
        if self.data.subset_by_class:
            self._choose_by_class()
        else:
            self._choose_by_key()
        self.shard_sizes[:] = [int.from_bytes(chosen.tobytes()).bit_count() for chosen in self._chosen]
        empty = [
            place for place, sizes in zip(self.places, self._sizes_by_set(), strict=True) if not sizes.sum()
        ]
        if empty and (self._weights() or not self.num_samples):
            raise UserError(
                empty_split_error(self.part, self.data.subset, self.data.holdout, ", ".join(empty))
            )

    def _choose_by_class(self) -> None:
        if not self.manifest.classes:
            raise UserError(
                f"data.subset_by_class: {self.places[0]} has no labels; build it from class folders"
            )
        with ThreadPoolExecutor(self.data.read_threads) as pool:
            shards = range(len(self._shards))
            keys = list(pool.map(lambda shard: self._whole_index(shard).keys, shards))
            labels = np.concatenate(list(pool.map(self.labels, shards)))
        flat = [key for of_shard in keys for key in of_shard]
        chosen = select_split(flat, self.part, self.data.subset, self.data.holdout, labels)
        ends = np.cumsum([len(of_shard) for of_shard in keys])
        self._chosen = [np.packbits(of_shard) for of_shard in np.split(chosen, ends[:-1])]

    def _choose_by_key(self) -> None:
        def choose(shard: int) -> np.ndarray:
            keys = self._whole_index(shard).keys
            return np.packbits(select_split(keys, self.part, self.data.subset, self.data.holdout))

        began, told = time.monotonic(), False
        self._chosen = []
        with ThreadPoolExecutor(self.data.read_threads) as pool:
            for shard, chosen in enumerate(pool.map(choose, range(len(self._shards)))):
                self._chosen.append(chosen)
                if not told and time.monotonic() - began > SLOW_START:
                    told = True
                    print(
                        f"data.subset, data.holdout: reading the keys of {len(self._shards)} shards, "
                        f"{shard + 1} done in {SLOW_START:g} s",
                        file=sys.stderr,
                    )

    def _sizes_by_set(self) -> list[np.ndarray]:
        ends = np.cumsum([len(place.manifest.shards) for place in self.sets])
        return np.split(self.shard_sizes, ends[:-1])

    def _weights(self) -> list[Fraction]:
        return [Fraction(str(source.weight)) for source in self.sources if source.weight is not None]

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = self._chosen_index(shard)
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > self._indexes_kept:
                self._indexes.popitem(last=False)
        return index

    def _chosen_index(self, shard: int, extension: str = "jpg") -> ShardIndex:
        index = self._whole_index(shard, extension)
        if self._chosen is None:
            return index
        chosen = np.flatnonzero(np.unpackbits(self._chosen[shard], count=len(index.keys)))
        return ShardIndex([index.keys[i] for i in chosen], index.offsets[chosen], index.sizes[chosen])

    def _whole_index(self, shard: int, extension: str = "jpg") -> ShardIndex:
        place, entry = self._shards[shard]
        name = idx_path("", entry).name
        where = f"{place.storage.place}/{name}"
        data = self._patiently(where, lambda heartbeat: place.storage.read_file(name, heartbeat))
        try:
            return verified_index(data, entry, extension, where)
        except ShardSetError as error:
            raise UserError(str(error)) from None

    def _patiently(self, where: str, attempt):
        return retry_with_timeout(attempt, where, self._patience, self._closed, self._warn)


def _is_local(place: ShardSet) -> bool:
    return isinstance(place.storage, LocalStorage)
