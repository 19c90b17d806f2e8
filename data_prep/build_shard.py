"""Builds one shard of a plan: read, prepare, pack, commit.

Invariant: a shard is done when its record is in the build directory. Tar, index and record are written under
temporary names, renamed in this order, and are a pure function of (plan, source, policy, shard number); so a
shard may be built again at any time, and the loser of a race has written the same bytes. Nobody waits for the
disk here: whether a finished shard outlived a power cut, its sha256 tells.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import images
from data_prep.errors import UserError
from data_prep.pixels import ImageError
from data_prep.shard_file import ShardWriter
from data_prep.shard_plan import ShardPlan
from data_prep.shard_set import (
    BUILD_DIRECTORY,
    Shard,
    ShardSetError,
    check_shard_bytes,
    idx_path,
    read_index,
    shard_name,
    tar_path,
    write_atomically,
)
from data_prep.source_reader import Reader
from data_prep.sources.sample import Location, Source
from data_prep.stats import Stats

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_RESERVE = 1 << 20  # bytes left free for indexes, records and the manifest

Report = Callable[[int, int, int, int], None]
"""Told after each input: bytes read, bytes packed, 1 if repaired, 1 if quarantined."""


@dataclass(frozen=True)
class Record:
    """What a built shard left for the manifest and the card. shard is None when no input was usable."""

    shard: Shard | None
    quarantine: list[dict[str, str]]
    stats: Stats


@dataclass(frozen=True)
class Job:
    """All that a worker has to know."""

    plan: ShardPlan
    source: Source
    policy: images.Policy
    directory: Path
    split: str

    @property
    def build_directory(self) -> Path:
        return self.directory / BUILD_DIRECTORY

    def name(self, number: int) -> str:
        return shard_name(self.source.kind, self.split, number)


def _record_path(directory: Path, name: str) -> Path:
    return directory / BUILD_DIRECTORY / f"{name}.json"


def build_shard(job: Job, number: int, reader: Reader, report: Report) -> Record:
    """Raises UserError when the source can't be read or the disk is full."""
    _check_free_disk(job, number)
    name, stats, quarantine = job.name(number), Stats(), []
    temporary = job.build_directory / f"{name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for sample in job.plan.shard(number):
                details = job.source.details(sample.key)
                data = b""
                try:
                    data = reader.read(sample.location)
                    image = images.prepare(data, job.policy, details.rotation)
                except ImageError as error:
                    quarantine.append(quarantine_entry(sample.location, error.reason, str(error)))
                    stats.quarantine[error.reason] += 1
                    report(len(data), 0, 0, 1)
                    continue
                files = [("jpg", image.data)]
                if sample.label >= 0:
                    files.append(("cls", str(sample.label).encode()))
                if details.metadata is not None:
                    files.append(("json", _compact(details.metadata)))
                writer.add(sample.key, files)
                stats.add(image, sample.label)
                report(len(data), len(image.data), int(bool(image.repairs)), 0)
            digest, index = writer.finish()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk may begin to store it
        shard = None
        if writer.samples:
            shard = Shard(
                name, writer.samples, writer.bytes, digest, len(index), hashlib.sha256(index).hexdigest()
            )
            os.replace(temporary, tar_path(job.directory, name))
            write_atomically(idx_path(job.directory, name), index, stored=False)
        record = Record(shard, quarantine, stats)
        write_atomically(_record_path(job.directory, name), _record_to_json(record, job.plan), stored=False)
        return record
    except OSError as error:
        raise disk_full(job.directory, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def disk_full(directory: Path, error: OSError | None = None) -> UserError:
    """What to tell the user when writing failed; without `error` the disk is known to be full."""
    if error is None or error.errno in _FULL:
        return UserError(f"{directory}: the disk or quota is full; make room and run the same command again")
    return UserError(f"{directory} can't be written: {error.strerror}")


def quarantine_entry(location: Location, reason: str, detail: str) -> dict[str, str]:
    return {"source": location.container, "member": location.member, "reason": reason, "detail": detail}


def read_record(directory: Path, name: str, plan_sha256: str) -> Record | None:
    """The record of a shard built earlier by the same plan, or None when it is still to be built."""
    try:
        document = json.loads(_record_path(directory, name).read_bytes())
        if document["plan_sha256"] != plan_sha256:
            return None
        shard = Shard(**document["shard"]) if document["shard"] else None
        return Record(shard, document["quarantine"], Stats.from_json(document["stats"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_finished(job: Job, number: int) -> bool:
    """Whether an earlier run built this shard and its files still have the bytes of then.

    They are read again: a machine that lost its power may have kept a file's name and lost its content.
    """
    record = read_record(job.directory, job.name(number), job.plan.sha256)
    if record is None:
        return False
    if record.shard is None:
        return True
    try:
        check_shard_bytes(job.directory, record.shard)
        read_index(job.directory, record.shard)
    except ShardSetError:
        return False
    return True


def _record_to_json(record: Record, plan: ShardPlan) -> bytes:
    document: dict[str, Any] = {
        "plan_sha256": plan.sha256,
        "shard": asdict(record.shard) if record.shard else None,
        "quarantine": record.quarantine,
        "stats": record.stats.to_json(),
    }
    return json.dumps(document).encode()


def estimated_bytes(job: Job, number: int) -> int:
    """About how large a shard will be: exact for what passes through, a guess for what is re-encoded."""
    limit = None if job.policy.resize is None else job.policy.resize**2 // 2
    return job.plan.shard_bytes(number, limit)


def _check_free_disk(job: Job, number: int) -> None:
    free = shutil.disk_usage(job.directory).free
    if free < estimated_bytes(job, number) + _DISK_RESERVE:
        raise disk_full(job.directory)


def _compact(metadata: Any) -> bytes:
    return json.dumps(metadata, separators=(",", ":"), sort_keys=True).encode()
