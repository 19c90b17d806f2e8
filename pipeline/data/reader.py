"""Reader of samples from shard sets; the only module of `pipeline.data` that imports `data_prep.shard_set`.

Invariant: a read returns the bytes that the manifest describes or raises a UserError that names shard and sample.
Indexes are verified against the manifest's checksum when they are loaded, and every image against the tar header
before it, so a shard that is truncated or replaced during a run is detected when it is read. Thread-safe.

Shards of several sets are numbered consecutively: those of the first set, then those of the second, and so on. With
`data.subset` or `data.holdout`, the samples of a shard are the selected ones; no other module sees the rest.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data_prep.shard_set import (
    MANIFEST,
    Manifest,
    ShardIndex,
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
from pipeline.data.retry import Heartbeat, RateLimitedWarnings, retry_with_timeout
from pipeline.data.sampler import ShardedSampler
from pipeline.data.split import Split, select_split
from pipeline.data.storage import LocalStorage, Span, UrlStorage, coalesce_spans, open_storage
from pipeline.errors import UserError
from pipeline.recipe.sections import FIRST_DELAY_S, DataSection, RetryPolicy, Source

logger = logging.getLogger(__name__)
T = TypeVar("T")

TAR_HEADER_BYTES = 512
MAX_VERIFIED_BYTES = 4 * 2**30  # a rank reads them in a few seconds


def check_sources(sources: Sequence[Source]) -> None:
    """Raise UserError if a local source is not a complete shard set. Reads only manifests."""
    for source in sources:
        storage = open_storage(source.path)
        if isinstance(storage, LocalStorage):
            read_manifest(storage.directory)


class ShardSet(NamedTuple):
    storage: LocalStorage | UrlStorage
    manifest: Manifest


class ShardReader:
    """Reads single samples of shard sets in any order, with a bounded number of open shards.

    Args:
        sources: path of one shard set, or several sources.
        data: how to read; subset and holdout.
        split: the samples to read, "training" or "held_out".
        first_delay_s: seconds before the first retry of a read.

    Raises:
        UserError: If a set is missing, incomplete or damaged, or the split is empty.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[Source],
        data: DataSection | None = None,
        split: Split = "training",
        first_delay_s: float = FIRST_DELAY_S,
    ):
        if isinstance(sources, str | Path):
            sources = [Source(path=str(sources))]
        self.sources, self.data = sources, data or DataSection()
        self.split: Split = split
        self._closed = threading.Event()
        self._retry_policy = RetryPolicy(self.data.timeout_s, self.data.retries, first_delay_s)
        self._warn = RateLimitedWarnings()
        self.sets = [self._open_set(source.path) for source in sources]
        self._check_duplicates()
        self._cache = self._open_cache()
        self._shards = [(shard_set, shard) for shard_set in self.sets for shard in shard_set.manifest.shards]
        # Of images and of annotations.
        cached_indexes = 2 * (4 + 2 * self.data.shuffle_window_shards * len(self.sets))
        self._index = lru_cache(cached_indexes)(self._load_selected_index)
        self.shard_sizes = np.array([shard.samples for _, shard in self._shards], np.int64)
        """(S,) samples in each shard."""
        self._selected: list[np.ndarray] | None = None  # for each shard, one bit a sample; None: all samples
        self._filter_digest: str | None = None
        self._is_split = self.data.subset < 1 or self.data.holdout > 0 or split == "held_out"
        if self._is_split:
            self._selected = self._select_by_class() if self.data.subset_by_class else self._select_by_key()
            self.shard_sizes[:] = [int.from_bytes(bits.tobytes()).bit_count() for bits in self._selected]
            self._check_not_empty()

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def manifest(self) -> Manifest:
        """The manifest of the only set. Raise UserError if there are several, as each has its own classes."""
        if len(self.sets) > 1:
            raise UserError(f"{', '.join(self.paths)}: several shard sets, but one is needed; pass only one")
        return self.sets[0].manifest

    @property
    def paths(self) -> list[str]:
        """The directories or URLs of the sets."""
        return [shard_set.storage.path for shard_set in self.sets]

    @property
    def fingerprint(self) -> str:
        """Digest of the shards' checksums in order, the sources' shares, the subset and the holdout."""
        content = "".join(shard.sha256 for _, shard in self._shards)
        weights = self._weights()
        if weights or self._is_split:
            num_shards = [len(shard_set.manifest.shards) for shard_set in self.sets]
            shares = [str(weight / sum(weights)) for weight in weights]
            selection: list = [self.split, self.data.subset, self.data.holdout]
            content += json.dumps([num_shards, shares, *selection, *["by class"] * self.data.subset_by_class])
        if self._filter_digest:
            content += f"filtered {self._filter_digest}"
        return hashlib.sha256(content.encode()).hexdigest()

    def filter_samples(self, keep: Sequence[np.ndarray]) -> None:
        """Restrict the reader to some of its samples. Call it before samplers are made.

        Args:
            keep: For each shard, bool (n,) over the samples that the reader has of it; at least one is True.
        """
        selected, digest = [], hashlib.sha256()
        for shard, kept in enumerate(keep):
            bits = np.zeros(self._shards[shard][1].samples, bool)
            bits[self._selected_rows(shard)[kept]] = True
            selected.append(np.packbits(bits))
            digest.update(selected[-1].tobytes())
        self._selected, self._filter_digest = selected, digest.hexdigest()
        self.shard_sizes[:] = [int(kept.sum()) for kept in keep]
        self._index.cache_clear()

    def source_info(self) -> list[dict]:
        """Return path, source, split, selected samples and all samples of each set, for the run's metadata."""
        return [
            {
                "path": shard_set.storage.path,
                "source": shard_set.manifest.source,
                "split": shard_set.manifest.split,
                "samples": int(sizes.sum()),
                "of": shard_set.manifest.num_samples,
            }
            for shard_set, sizes in zip(self.sets, self._sizes_by_set(), strict=True)
        ]

    def sampler(self, seed: int) -> ShardedSampler | MixtureSampler:
        """Return the sampler of these samples."""
        window = self.data.shuffle_window_shards
        if not self._weights():
            return ShardedSampler(self.shard_sizes, seed, window)
        return MixtureSampler(self._sizes_by_set(), self._weights(), seed, window)

    def verify_checksums(self, rank: int, world_size: int) -> str | None:
        """Verify this rank's part of the local shards against the manifest's checksums.

        Returns:
            None, or a message about what was not verified: sets behind a URL, and all shards if a rank's part is
            larger than `MAX_VERIFIED_BYTES`, which would delay the start.

        Raises:
            UserError: If a shard does not match.
        """
        local = [
            (shard_set.storage.directory, shard)
            for shard_set, shard in self._shards
            if isinstance(shard_set.storage, LocalStorage)
        ]
        if sum(shard.bytes for _, shard in local) > MAX_VERIFIED_BYTES * world_size:
            directories = dict.fromkeys(directory for directory, _ in local)
            commands = ", ".join(f"`python -m data_prep verify {directory}`" for directory in directories)
            return f"too large to verify the checksums at the start; run {commands}"
        for directory, shard in local[rank::world_size]:
            check_shard_bytes(directory, shard)
        if len(local) < len(self._shards):
            return "checksums of sets behind a URL are not verified at the start; with data.cache_dir each shard's is"
        return None

    def read(self, shard: int, index: int) -> np.ndarray:
        """Return the encoded image of one sample, uint8 (bytes,)."""
        return self.read_many(shard, [index])[0]

    def read_many(self, shard: int, indexes: Sequence[int], extension: str = "jpg") -> list[np.ndarray]:
        """Return the encoded images of samples of one shard, or their files of another kind, uint8 (bytes,) each.

        Ascending indexes are cheapest, because neighbors are read together.

        Raises:
            UserError: If a sample cannot be read.
            Cancelled: After `close`.
        """
        index = self._index(shard, extension)
        starts = (index.offsets[indexes] - TAR_HEADER_BYTES).tolist()
        ends = (index.offsets[indexes] + index.sizes[indexes]).tolist()
        images = []
        for row, data in zip(indexes, self._read_ranges(shard, starts, ends), strict=True):
            name, size = index.names[row], len(data) - TAR_HEADER_BYTES
            if not is_header_of(data[:TAR_HEADER_BYTES], name, size):
                raise UserError(
                    f"{self.shard_path(shard)}: no longer holds sample {name!r} at its indexed offset: it was "
                    f"replaced or damaged; {self.repair_hint(shard)}"
                )
            images.append(np.frombuffer(data, np.uint8, size, TAR_HEADER_BYTES))
        return images

    def labels(self, shard: int) -> np.ndarray:
        """Return the classes of a shard's samples, int64 (n,): indexes of `manifest.classes`."""
        manifest = self._shards[shard][0].manifest
        extension = manifest.label_extension
        index = self._load_selected_index(shard, extension or "jpg")
        contents = [b""] * len(index.keys)
        if extension:
            contents = self._read_ranges(shard, index.offsets.tolist(), (index.offsets + index.sizes).tolist())
        try:
            return np.array(manifest.read_labels(index.keys, contents), np.int64)
        except ValueError as error:
            message = f"{self.shard_path(shard)}: a label cannot be read ({error}); {self.repair_hint(shard)}"
            raise UserError(message) from error

    def mean_bytes(self, shard: int) -> int:
        """Return the mean bytes of a sample of the shard with its tar headers, from the manifest alone."""
        entry = self._shards[shard][1]
        return -(-entry.bytes // entry.samples)

    def key(self, shard: int, index: int) -> str:
        """Return the key of a sample in its shard set."""
        return self._index(shard, "jpg").keys[index]

    def key_of(self, sample_id: int) -> str:
        """Return the key of the sample at a position in [0, num_samples), in the order of the shards."""
        ends = np.cumsum(self.shard_sizes)
        shard = int(np.searchsorted(ends, sample_id, side="right"))
        return self.key(shard, int(sample_id - ends[shard] + self.shard_sizes[shard]))

    def shard_path(self, shard: int) -> str:
        """Return the file or URL of a shard, for messages."""
        shard_set, entry = self._shards[shard]
        return f"{shard_set.storage.path}/{entry.name}.tar"

    def repair_hint(self, shard: int) -> str:
        """Return how to repair a damaged shard, for messages."""
        storage = self._shards[shard][0].storage
        if isinstance(storage, LocalStorage):
            return f"run `python -m data_prep verify {storage.path}` and rebuild the shard set"
        return "run `python -m data_prep verify` where the set was built and upload it again"

    def close(self) -> None:
        """Cancel all reads, which then raise Cancelled."""
        self._closed.set()

    def reopen(self) -> None:
        """Allow reads again after `close`, once no thread reads any more."""
        self._closed.clear()

    def _open_set(self, path: str) -> ShardSet:
        storage = open_storage(path)
        if isinstance(storage, LocalStorage):
            manifest = read_manifest(storage.directory)
            check_shard_files(storage.directory, manifest)
        else:
            url = f"{storage.path}/{MANIFEST}"
            data = self._retry(url, lambda heartbeat: storage.read_file(MANIFEST, heartbeat))
            manifest = parse_manifest(data, url)
        return ShardSet(storage, manifest)

    def _check_duplicates(self) -> None:
        """Raise a UserError if two sources have the same shards, even under different paths."""
        paths: dict[tuple[str, ...], str] = {}
        for shard_set in self.sets:
            content = tuple(shard.sha256 for shard in shard_set.manifest.shards)
            if content in paths:
                raise UserError(f"{paths[content]} and {shard_set.storage.path} are the same shard set; remove one")
            paths[content] = shard_set.storage.path

    def _open_cache(self) -> ShardCache | None:
        data = self.data
        if data.cache_dir is None:
            return None
        assert data.cache_gb is not None  # the recipe requires both or neither
        window = data.shuffle_window_shards
        sizes = [sorted(shard.bytes for shard in shard_set.manifest.shards) for shard_set in self.sets]
        window_bytes = sum(sum(of_set[-window:]) for of_set in sizes)
        if window_bytes > data.cache_gb * 1e9:  # each shard would be fetched for nearly every sample
            raise UserError(
                f"data.cache_gb: {data.cache_gb:g} is less than the {window_bytes / 1e9:.3g} GB of a shuffle window; "
                "raise it, or lower data.shuffle_window_shards"
            )
        return ShardCache(data.cache_dir, int(data.cache_gb * 1e9), 2 * window, self._closed)

    def _read_ranges(self, shard: int, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Read byte ranges of a shard, neighboring ones together."""
        shard_set, entry = self._shards[shard]
        storage, name, path = shard_set.storage, tar_path("", entry).name, self.shard_path(shard)

        def read(spans: Sequence[Span]) -> list[bytes]:
            return self._retry(path, lambda heartbeat: storage.read(name, spans, heartbeat))

        max_gap = LocalStorage.max_gap if self._cache else storage.max_gap
        spans, span_of_range = coalesce_spans(starts, ends, max_gap)
        if self._cache is None:
            parts = read(spans)
        else:
            original = CachedShard(path, entry.sha256, entry.bytes, lambda at, size: read([(at, size)])[0])
            parts = self._cache.read(original, spans)
        # Slices are copies, so that an image does not keep its neighbors in memory.
        return [
            parts[row][start - spans[row][0] : end - spans[row][0]]
            for row, start, end in zip(span_of_range, starts, ends, strict=True)
        ]

    def _select_by_class(self) -> list[np.ndarray]:
        if not self.manifest.has_labels:
            raise UserError(
                f"data.subset_by_class: {self.paths[0]} has no labels; build it with labels, or remove this key"
            )
        with ThreadPoolExecutor(self.data.read_threads) as pool:
            shards = range(len(self._shards))
            keys = list(pool.map(lambda shard: self._load_index(shard).keys, shards))
            labels = np.concatenate(list(pool.map(self.labels, shards)))
        all_keys = [key for shard_keys in keys for key in shard_keys]
        selected = select_split(all_keys, self.split, self.data.subset, self.data.holdout, labels)
        ends = np.cumsum([len(shard_keys) for shard_keys in keys])
        return [np.packbits(of_shard) for of_shard in np.split(selected, ends[:-1])]

    def _select_by_key(self) -> list[np.ndarray]:
        def select(shard: int) -> np.ndarray:
            keys = self._load_index(shard).keys
            return np.packbits(select_split(keys, self.split, self.data.subset, self.data.holdout))

        logger.info(f"data.subset, data.holdout: reading the keys of {len(self._shards)} shards")
        with ThreadPoolExecutor(self.data.read_threads) as pool:
            return list(pool.map(select, range(len(self._shards))))

    def _check_not_empty(self) -> None:
        sizes = zip(self.paths, self._sizes_by_set(), strict=True)
        empty = [path for path, set_sizes in sizes if not set_sizes.sum()]
        if empty and (self._weights() or not self.num_samples):
            key = "subset" if self.split == "training" and self.data.subset < 1 else "holdout"
            share = getattr(self.data, key)
            raise UserError(f"data.{key}: {share:g} leaves no {self.split} sample of {', '.join(empty)}; change it")

    def _sizes_by_set(self) -> list[np.ndarray]:
        ends = np.cumsum([len(shard_set.manifest.shards) for shard_set in self.sets])
        return np.split(self.shard_sizes, ends[:-1])

    def _weights(self) -> list[Fraction]:
        return [Fraction(str(source.weight)) for source in self.sources if source.weight is not None]

    def _selected_rows(self, shard: int) -> np.ndarray:
        samples = self._shards[shard][1].samples
        if self._selected is None:
            return np.arange(samples)
        return np.flatnonzero(np.unpackbits(self._selected[shard], count=samples))

    def _load_selected_index(self, shard: int, extension: str = "jpg") -> ShardIndex:
        index = self._load_index(shard, extension)
        if self._selected is None:
            return index
        rows = self._selected_rows(shard)
        keys, names = ([column[row] for row in rows] for column in (index.keys, index.names))
        return ShardIndex(keys, names, index.offsets[rows], index.sizes[rows])

    def _load_index(self, shard: int, extension: str = "jpg") -> ShardIndex:
        shard_set, entry = self._shards[shard]
        storage, name = shard_set.storage, idx_path("", entry).name
        path = f"{storage.path}/{name}"
        data = self._retry(path, lambda heartbeat: storage.read_file(name, heartbeat))
        return verified_index(data, entry, extension, path)

    def _retry(self, path: str, attempt: Callable[[Heartbeat], T]) -> T:
        return retry_with_timeout(attempt, path, self._retry_policy, self._closed, self._warn)
