"""From a source to a whole shard set: plan, build what is missing, finish.

Invariant: OUT is always one of three things: absent (or empty), an unfinished build of exactly one plan (it
has a .build directory), or a whole set (it has a manifest). Each step may be interrupted at any point and
repeated; the bytes of the whole set do not depend on how often, nor on the number of workers.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.card import write_card
from data_prep.errors import UserError
from data_prep.images import Policy
from data_prep.pack import Job, disk_full, estimated_bytes, quarantine_entry, read_record
from data_prep.pixels import load_resizer
from data_prep.plan import Plan, ShardSize
from data_prep.progress import Progress
from data_prep.shard_set import (
    BUILD_DIRECTORY,
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    Manifest,
    ShardSetError,
    check_shard_files,
    idx_path,
    read_manifest,
    tar_path,
    write_atomically,
    write_manifest,
)
from data_prep.sources.sample import Source
from data_prep.stats import Stats
from data_prep.workers import build_shards

_IDENTITY = "build.json"


@dataclass(frozen=True)
class Settings:
    """What the user decided besides the source. Everything but `workers` is in the manifest's
    options."""

    split: str
    seed: int
    shard_size: ShardSize
    policy: Policy
    workers: int


def build(source: Source, out: Path, settings: Settings, say=print) -> Manifest:
    """Builds, or continues, the shard set of `source` in `out`; returns at once where it is whole already.

    Raises UserError before anything is written when OUT holds something else; UserError or BuildStopped later
    leave a build that the same call continues.
    """
    _check_out(out)
    job, identity = prepare(source, out, settings, say)
    whole = _already_whole(out, identity)
    if whole is not None:
        say(f"{out} is whole already: {whole.num_samples:,} samples in {len(whole.shards):,} shards")
        return whole
    created = not out.exists()
    _begin(job, identity)
    try:
        with _lock(job, exclusive=True):
            run_shards(job, range(job.plan.num_shards), settings.workers)
            manifest = finish(job, identity)
    except _NothingUsable as error:
        for path in (job.build_directory, out) if created else (job.build_directory,):
            shutil.rmtree(path)
        raise UserError(str(error)) from None
    say(
        f"{out}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, "
        f"{sum(manifest.repairs.values()):,} repaired, {manifest.quarantined:,} quarantined"
    )
    return manifest


def prepare(source: Source, out: Path, settings: Settings, say=print) -> tuple[Job, dict[str, Any]]:
    """Plans, and says what will be done. Returns the job and the build's identity; writes nothing."""
    plan = Plan(source.samples(), settings.seed, settings.shard_size)
    job = Job(plan, source, settings.policy, out, settings.split)
    options = {**asdict(settings.policy), "shard_samples": settings.shard_size.samples}
    options |= {"shard_bytes": settings.shard_size.bytes, "layout": source.layout}
    identity = {
        "source": source.kind,
        "split": settings.split,
        "seed": settings.seed,
        "options": options,
        "plan_sha256": plan.sha256,
    }
    classes = f", {len(source.classes.names):,} classes" if source.classes.names else ""
    say(
        f"{source.kind} ({source.layout}): {plan.num_inputs:,} inputs{classes}, "
        f"{plan.source_bytes / 1e6:,.1f} MB -> {plan.num_shards:,} shards in {out}"
    )
    return job, identity


def run_shards(job: Job, numbers: range, workers: int) -> None:
    """Builds those of the shards `numbers` that are not finished."""
    missing = [number for number in numbers if read_record(job, number) is None]
    needed = sum(estimated_bytes(job, number) for number in missing)
    free = shutil.disk_usage(job.directory).free
    if free < needed:
        raise UserError(
            f"{job.directory}: the build needs about {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free"
        )
    if job.policy.resize is not None:
        load_resizer()
    progress = Progress(sum(job.plan.shard_inputs(number) for number in missing))
    try:
        build_shards(job, numbers, workers, progress.update)
    finally:
        progress.close()


def finish(job: Job, identity: dict[str, Any]) -> Manifest:
    """Writes quarantine, card and, last, the manifest. Raises UserError when a shard is missing."""
    shards, stats = [], Stats()
    quarantine = []
    for refused in job.plan.refused:
        reason, _, detail = refused.reason.partition(": ")
        quarantine.append(quarantine_entry(refused.location, reason, detail))
        stats.quarantine[reason] += 1
    for number in range(job.plan.num_shards):
        record = read_record(job, number)
        if record is None:
            raise UserError(f"{job.directory}: shard {job.name(number)} is not built yet; run its task again")
        stats.merge(record.stats)
        quarantine += record.quarantine
        if record.shard is not None:
            shards.append(record.shard)
    if not shards:
        first = f"; the first: {quarantine[0]['source']}: {quarantine[0]['detail']}" if quarantine else ""
        raise _NothingUsable(
            f"no readable image in {job.source.root}: {len(quarantine):,} inputs refused{first}"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        **identity,
        inputs=job.plan.num_inputs,
        quarantined=len(quarantine),
        repairs=dict(sorted(stats.repairs.items())),
        classes=job.source.classes.names,
        class_names=job.source.classes.readable,
        shards=tuple(shards),
    )
    try:
        check_shard_files(job.directory, manifest)
        lines = "".join(json.dumps(entry) + "\n" for entry in quarantine)
        write_atomically(job.directory / QUARANTINE, lines.encode())
        write_card(job.directory, manifest, stats)
        for shard in shards:  # a manifest that survives a power cut must not speak of shards that did not
            for path in (tar_path(job.directory, shard), idx_path(job.directory, shard)):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        write_manifest(job.directory, manifest)
    except ShardSetError as error:
        raise UserError(f"{error}") from None
    except OSError as error:
        raise disk_full(job.directory) from error
    _remove_build_directory(job.directory)
    return manifest


class _NothingUsable(Exception):
    """Every input was refused: there is no set."""


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out} is a file, not a directory")
    if (
        out.is_dir()
        and not (out / MANIFEST).exists()
        and not (out / BUILD_DIRECTORY).exists()
        and any(out.iterdir())
    ):
        raise UserError(f"OUT {out} is not empty and holds no shard set; choose another directory")


def _already_whole(out: Path, identity: dict[str, Any]) -> Manifest | None:
    if not (out / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(out)
    except ShardSetError as error:
        raise UserError(str(error)) from None
    held = {name: getattr(manifest, name) for name in identity}
    _same_build(out, held, identity, "another shard set")
    _remove_build_directory(out)
    return manifest


def _begin(job: Job, identity: dict[str, Any]) -> None:
    """Marks OUT as an unfinished build of this plan, or checks that it is one."""
    path = job.build_directory / _IDENTITY
    try:
        held = json.loads(path.read_bytes())
    except FileNotFoundError:
        try:
            job.build_directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(identity, indent=1).encode())
        except OSError as error:
            raise UserError(f"OUT {job.directory} can't be written: {error.strerror}") from None
        return
    except (OSError, ValueError):
        raise UserError(f"{path} can't be read: remove {job.directory} and build again") from None
    _same_build(job.directory, held, identity, "an unfinished build of another set")


def _same_build(out: Path, held: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    if held == wanted:
        return
    flat_held, flat_wanted = ({**d, **d.get("options", {})} for d in (held, wanted))
    for name, value in flat_wanted.items():
        if name not in ("options", "plan_sha256") and flat_held.get(name) != value:
            raise UserError(
                f"OUT {out} holds {what} ({name} {flat_held.get(name)!r}, not {value!r}); choose another"
            )
    raise UserError(f"OUT {out} holds {what} (its source had other files); choose another directory")


@contextlib.contextmanager
def _lock(job: Job, exclusive: bool) -> Iterator[None]:
    """Keeps two builds out of one directory, where the file system has locks."""
    with open(job.build_directory / "lock", "w") as file:
        os.register_at_fork(after_in_child=file.close)
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"OUT {job.directory} is being built by another process") from None
        except OSError:
            pass
        if exclusive:
            for leftover in job.build_directory.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
        yield


def _remove_build_directory(out: Path) -> None:
    shutil.rmtree(out / BUILD_DIRECTORY, ignore_errors=True)
