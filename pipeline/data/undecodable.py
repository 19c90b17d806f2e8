"""Undecodable samples, although the shard set was verified, and their substitutes.

Invariant: the substitute of a sample is the next decodable sample of its shard (after the last comes the
first), so it is a function of the data alone, not of ranks or restarts. It is cropped, flipped and masked with
the random numbers of the sample it replaces, and the sample trace names that sample.

Each rank counts and logs a sample once, and appends {"shard", "sample", "reason"} to RUN/replaced/rank-R.jsonl,
which all ranks read when the run resumes. A sample on which DALI failed is logged and written only when its batch has
been decoded with the substitute, so that a failing device leaves no record.
"""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.reader import ShardReader
from pipeline.distributed.logging import ALL_RANKS
from pipeline.errors import UserError, join_names

logger = logging.getLogger(__name__)


class UndecodableSamples:
    """The samples of a reader that are known to be undecodable. Thread-safe.

    Args:
        limit: number of samples above which `add` raises.
        directory: folder of the rank-R.jsonl files; None keeps no files.
    """

    def __init__(self, reader: ShardReader, limit: int, directory: Path | None = None, rank: int = 0):
        self._reader, self._limit = reader, limit
        self._names: set[tuple[str, str]] = set()
        self._reasons: dict[tuple[int, int], str] = {}
        self._unconfirmed: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()
        self._path = directory / f"rank-{rank}.jsonl" if directory else None
        for path in sorted(directory.glob("rank-*.jsonl")) if directory else ():
            self._names.update((line["shard"], line["sample"]) for line in _read_lines(path))

    @property
    def count(self) -> int:
        """Samples known so far, including those of earlier starts of the run, without unconfirmed ones."""
        return len(self._names) - len(self._unconfirmed)

    def add(self, shard: int, index: int, reason: str, confirmed: bool = True) -> None:
        """Record that a sample cannot be decoded. Raise UserError if there are more than `limit`.

        Args:
            confirmed: Log and write it now, not at the next `confirm`.
        """
        with self._lock:
            if (shard, index) in self._reasons:
                return
            self._reasons[shard, index] = reason
            path, key = self._reader.shard_path(shard), self._reader.key(shard, index)
            if (path, key) not in self._names:
                self._names.add((path, key))
                if confirmed:
                    self._report(path, key, reason)
                else:
                    self._unconfirmed.append((path, key, reason))
            if len(self._names) > self._limit:
                names = join_names([f"{path} sample {key!r}" for path, key in sorted(self._names)])
                raise UserError(
                    f"data.max_undecodable: more than {self._limit} samples cannot be decoded: {names}; "
                    f"{self._reader.repair_hint(shard)}"
                )

    def confirm(self) -> None:
        """Log and write the samples that were added without confirmation."""
        with self._lock:
            for sample in self._unconfirmed:
                self._report(*sample)
            self._unconfirmed.clear()

    def substitute(self, shard: int, index: int) -> int:
        """Return the index to read for a sample: its own, unless it is known to be undecodable."""
        size = int(self._reader.shard_sizes[shard])
        for step in range(size):
            candidate = (index + step) % size
            if (shard, candidate) not in self._reasons:
                return candidate
        path, hint = self._reader.shard_path(shard), self._reader.repair_hint(shard)
        raise UserError(f"{path}: none of its samples can be decoded; {hint}")

    def _report(self, path: str, key: str, reason: str) -> None:
        logger.warning(
            f"{path}, sample {key!r}: cannot be decoded, using the next sample instead: {reason}", extra=ALL_RANKS
        )
        if self._path:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "a") as file:
                file.write(json.dumps({"shard": path, "sample": key, "reason": reason}) + "\n")


def _read_lines(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # truncated when the run was killed; the sample will be found again
            continue
