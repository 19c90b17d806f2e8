"""Build one shard of a plan: read, check, write, commit.

Invariant: a shard is finished once its record is in the build directory. Tar, index and record are written
under temporary names and renamed in this order. Their bytes are a pure function of (plan, source, policy,
shard number), so a shard may be built again, or by two processes at once. Nothing is fsynced here: after a
power failure `is_finished` detects lost content by its sha256.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import images
from data_prep.atomic import atomic_write, temporary_name
from data_prep.errors import UserError
from data_prep.label_map import check_label_map
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
)
from data_prep.source_reader import SourceReader
from data_prep.sources.sample import Source
from data_prep.stats import Stats
from data_prep.workers import CountInput

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_RESERVE = 1 << 20  # bytes left free for indexes, records and the manifest


@dataclass(frozen=True)
class Record:
    """Result of building a shard, for manifest and card; `shard` is None if no input was usable."""

    shard: Shard | None
    quarantine: list[dict[str, str]]
    stats: Stats


@dataclass(frozen=True)
class BuildJob:
    """Everything that a worker needs to build a shard."""

    plan: ShardPlan
    source: Source
    policy: images.Policy
    directory: Path
    split: str

    def shard_name(self, number: int) -> str:
        return shard_name(self.source.kind, self.split, number)

    def read_record(self, number: int) -> Record | None:
        return read_record(self.directory, self.shard_name(number), self.plan.sha256)

    def estimate_bytes(self, number: int) -> int:
        """Estimate a shard's size: exact for images passed through, a guess for re-encoded ones."""
        limit = None if self.policy.resize is None else self.policy.resize**2 // 2
        return self.plan.shard_bytes(number, limit)

    def is_finished(self, number: int) -> bool:
        """Return whether an earlier run built this shard and its files still have the same bytes.

        The files are read again, because a power failure may keep a file's name and lose its content.
        """
        record = self.read_record(number)
        return record is not None and is_intact(self.directory, record.shard)

    def open(self) -> Callable[[int, CountInput], None]:
        reader = SourceReader(self.source.root, staging_directory(self.directory))
        return lambda number, count_input: build_shard(self, number, reader, count_input)


def write_record(
    directory: Path, name: str, plan_sha256: str, shard: Shard | None, quarantine: list[dict[str, str]], stats: Stats
) -> None:
    """Record that a shard is finished."""
    record: dict[str, Any] = {"plan_sha256": plan_sha256, "shard": shard and asdict(shard)}
    record |= {"quarantine": quarantine, "stats": stats.to_json()}
    atomic_write(_record_path(directory, name), json.dumps(record).encode(), fsync=False)


def _record_path(directory: Path, name: str) -> Path:
    return directory / BUILD_DIRECTORY / f"{name}.json"


def staging_directory(directory: Path) -> Path:
    """Return the folder of the staged images of a set that is being built (data_prep/parquet_staging.py)."""
    return directory / BUILD_DIRECTORY / "staged"


def build_shard(job: BuildJob, number: int, reader: SourceReader, count_input: CountInput) -> None:
    """Build the shard `number`. Raises UserError if the source cannot be read or OUT cannot be written."""
    if shutil.disk_usage(job.directory).free < job.estimate_bytes(number) + _DISK_RESERVE:
        raise write_error(job.directory)
    name, stats, quarantine = job.shard_name(number), Stats(), []
    temporary = job.directory / BUILD_DIRECTORY / temporary_name(name)
    try:
        with open(temporary, "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for sample in job.plan.shard(number):
                details = job.source.details(sample.key)
                data = b""
                try:
                    data = reader.read(sample.location)
                    image = images.prepare(data, job.policy, details.rotation)
                    labels = [sample.label] if sample.label >= 0 else []
                    label_map = b""
                    if details.label_map is not None:
                        label_map = reader.read(details.label_map)
                        values = check_label_map(label_map, image.width, image.height, len(job.source.classes.names))
                        labels = (values - 1).tolist()
                    copied = job.source.read_files(sample, reader.read)
                except ImageError as error:
                    quarantine.append(sample.location.quarantine_entry(error.reason, str(error)))
                    stats.quarantine[error.reason] += 1
                    count_input(len(data), 0, 0, 1)
                    continue
                files = [("jpg", image.data)]
                if sample.label >= 0:
                    files.append(("cls", str(sample.label).encode()))
                if details.metadata is not None:
                    metadata = json.dumps(details.metadata, separators=(",", ":"), sort_keys=True)
                    files.append(("json", metadata.encode()))
                files += copied
                if label_map:
                    files.append(("png", label_map))
                writer.add(sample.key, files)
                stats.add(image, len(image.data), labels)
                stats.unreadable.update(details.unreadable)
                count_input(len(data) + len(label_map), len(image.data) + len(label_map), int(bool(image.repairs)), 0)
            digest, index = writer.finish()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # start writing to disk
        shard = None
        if writer.samples:
            shard = Shard(name, writer.samples, writer.bytes, digest, len(index), hashlib.sha256(index).hexdigest())
            os.replace(temporary, tar_path(job.directory, name))
            atomic_write(idx_path(job.directory, name), index, fsync=False)
        write_record(job.directory, name, job.plan.sha256, shard, quarantine, stats)
    except OSError as error:
        raise write_error(job.directory, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_error(directory: Path, error: OSError | None = None) -> UserError:
    """Return the UserError for a failed write; without `error`, for a disk that is known to be full."""
    if error is None or error.errno in _DISK_FULL:
        return UserError(f"{directory}: the disk or quota is full; free some space and run the same command again")
    return UserError(f"{directory}: cannot be written: {error.strerror}")


def read_record(directory: Path, name: str, plan_sha256: str) -> Record | None:
    """Read the record of a shard that the same plan has built; None if there is none."""
    try:
        document = json.loads(_record_path(directory, name).read_bytes())
        if document["plan_sha256"] != plan_sha256:
            return None
        shard = Shard(**document["shard"]) if document["shard"] else None
        return Record(shard, document["quarantine"], Stats.from_json(document["stats"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_intact(
    directory: Path, shard: Shard | None, checks: Sequence[Callable] = (check_shard_bytes, read_index)
) -> bool:
    """Return whether a recorded shard, if its inputs made one, passes the checks."""
    try:
        for check in checks if shard is not None else ():
            check(directory, shard)
    except ShardSetError:
        return False
    return True
