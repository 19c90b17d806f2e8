"""The bytes of a sample: the only door from the loader to a shard set on disk.

Invariant: what `read` returns is the file that the manifest promises, or there is a `UserError` that names
shard and sample. Indexes are checked against the manifest when they are first used.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_prep.shard_set import (
    Manifest,
    ShardIndex,
    ShardSetError,
    check_shard_bytes,
    check_shard_files,
    read_index,
    read_manifest,
    tar_path,
)
from pipeline.errors import UserError

OPEN_SHARDS = 256
CHECKED_BYTES = 4 * 2**30  # some seconds of reading


class ShardReader:
    """Reads single samples of a shard set, in any order, holding a bounded number of shards open."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.manifest: Manifest = read_manifest(self.directory)
            check_shard_files(self.directory, self.manifest)
        except ShardSetError as error:
            raise UserError(str(error)) from None
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()
        self._lock = threading.Lock()  # the planner reads while the loop asks for keys

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: a digest of the shards' checksums, in order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    @property
    def shard_sizes(self) -> np.ndarray:
        """(S,) samples in each shard."""
        return np.array([shard.samples for shard in self.manifest.shards], np.int64)

    def check_bytes(self, part: int, num_parts: int) -> bool:
        """Compare every `num_parts`-th shard, from the `part`-th, with its checksum. UserError at a fault.

        Returns False, with nothing checked, where a part is more than `CHECKED_BYTES`: that would delay the
        start.
        """
        if sum(shard.bytes for shard in self.manifest.shards) > CHECKED_BYTES * num_parts:
            return False
        for shard in self.manifest.shards[part::num_parts]:
            try:
                check_shard_bytes(self.directory, shard)
            except ShardSetError as error:
                raise UserError(str(error)) from None
        return True

    def read(self, shard: int, index: int) -> np.ndarray:
        """The encoded image of one sample, uint8 (bytes,)."""
        with self._lock:
            file, entries = self._shard(shard)
            size = int(entries.sizes[index])
            try:
                data = os.pread(file, size, int(entries.offsets[index]))
            except OSError as error:
                raise UserError(f"{self._name(shard)}: cannot be read: {error}") from None
        if len(data) != size:
            raise UserError(
                f"{self._name(shard)}: ends inside sample {entries.keys[index]!r}; "
                f"run `python -m data_prep verify {self.directory}`"
            )
        return np.frombuffer(data, np.uint8)

    def key(self, shard: int, index: int) -> str:
        """The sample's key in the shard set."""
        with self._lock:
            return self._shard(shard)[1].keys[index]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        if shard not in self._open:
            entry = self.manifest.shards[shard]
            try:
                index = read_index(self.directory, entry)
                file = os.open(tar_path(self.directory, entry), os.O_RDONLY)
            except ShardSetError as error:
                raise UserError(str(error)) from None
            except OSError as error:
                raise UserError(f"{self._name(shard)}: cannot be opened: {error.strerror}") from None
            self._open[shard] = (file, index)
            while len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(shard)
        return self._open[shard]

    def _name(self, shard: int) -> Path:
        return tar_path(self.directory, self.manifest.shards[shard])
