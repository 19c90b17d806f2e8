"""Images that cannot be decoded although `verify` passed them: which they are, and what stands in for them.

Invariant: the sample that stands in is the next one of the same shard (the first after the last) that can be
decoded, so it is a function of the data alone: not of ranks, restarts, or who met the image first. It is cut,
mirrored and masked by the random numbers of the sample in whose place it stands, which is also what the trace
writes down.

A sample is counted and reported once by each rank, however many epochs meet it. What all ranks have found is
kept in RUN/replaced/rank-R.jsonl, {"shard", "sample", "reason"} a line, and known again after a restart.
"""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.reader import ShardReader
from pipeline.errors import UserError

NAMED = 3
"""Samples that the message of a run which met too many of them names."""


class UndecodableSamples:
    """The samples that are known to fail. Any thread may ask."""

    def __init__(self, reader: ShardReader, limit: int, directory: Path | None = None, rank: int = 0):
        """limit: samples; one more ends the run. directory: where they are written down, if anywhere."""
        self._reader, self._limit = reader, limit
        self._failed: set[tuple[str, str]] = set()
        self._known: dict[tuple[int, int], str] = {}
        self._lock = threading.Lock()
        self._path = directory / f"rank-{rank}.jsonl" if directory else None
        for path in sorted(directory.glob("rank-*.jsonl")) if directory else ():
            self._failed.update((line["shard"], line["sample"]) for line in _lines(path))

    @property
    def found(self) -> int:
        """Samples known so far, those of earlier starts among them."""
        return len(self._failed)

    def add(self, shard: int, index: int, reason: str) -> None:
        """This sample cannot be decoded. UserError where these are too many."""
        with self._lock:
            if (shard, index) in self._known:
                return
            self._known[shard, index] = reason
            name, key = self._reader.name(shard), self._reader.key(shard, index)
            if (name, key) not in self._failed:
                self._failed.add((name, key))
                self._report(name, key, reason)
            if len(self._failed) > self._limit:
                raise UserError(self._too_many(shard))

    def substitute(self, shard: int, index: int) -> int:
        """The sample to read in place of this one: itself, unless it is known to fail. UserError where the
        whole shard is."""
        size = int(self._reader.shard_sizes[shard])
        for step in range(size):
            candidate = (index + step) % size
            if (shard, candidate) not in self._known:
                return candidate
        raise UserError(
            f"{self._reader.name(shard)}: none of its samples can be decoded; {self._reader.repair_hint(shard)}"
        )

    def _report(self, name: str, key: str, reason: str) -> None:
        print(
            f"{name}, sample {key!r}: cannot be decoded, the next sample stands in for it: {reason}",
            file=sys.stderr,
            flush=True,
        )
        if self._path:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "a") as file:
                file.write(json.dumps({"shard": name, "sample": key, "reason": reason}) + "\n")

    def _too_many(self, shard: int) -> str:
        named = [f"{name}, sample {key!r}" for name, key in sorted(self._failed)[:NAMED]]
        if len(self._failed) > NAMED:
            named.append(f"and {len(self._failed) - NAMED} more")
        return (
            f"data.max_undecodable: more than {self._limit} samples cannot be decoded: {'; '.join(named)}; "
            f"{self._reader.repair_hint(shard)}"
        )


def _lines(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut short by a kill: that sample will be met again
            continue
