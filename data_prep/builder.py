"""From a source to a whole shard set: plan, build what is missing, finish.

Invariant: OUT is always one of three things: absent (or empty), an unfinished build of exactly one plan (it
has a .build directory), or a whole set (it has a manifest). Each step may be interrupted at any point and
repeated; the bytes of the whole set do not depend on how often, nor on the number of workers and array tasks.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.build_shard import Job, estimated_bytes, read_record
from data_prep.errors import UserError
from data_prep.finalize import (
    NothingUsable,
    build_state_of,
    finalize_build,
    lock,
    read_build_state,
    refused_entries,
    remove_build_directory,
    summarize,
    write_build_state,
)
from data_prep.images import Policy
from data_prep.pixels import load_resizer
from data_prep.progress import Progress
from data_prep.shard_plan import ShardPlan, ShardSize
from data_prep.shard_set import (
    BUILD_DIRECTORY,
    MANIFEST,
    QUARANTINE,
    Manifest,
    ShardSetError,
    check_shard_files,
    read_manifest,
)
from data_prep.sources.sample import Source
from data_prep.workers import build_shards


@dataclass(frozen=True)
class Task:
    """The index-th of `count` shares of a build, from 0: every count-th shard."""

    index: int
    count: int


@dataclass(frozen=True)
class Settings:
    """What the user decided besides the source. workers and task decide nothing about the set's bytes."""

    split: str
    seed: int
    shard_size: ShardSize
    policy: Policy
    workers: int
    task: Task | None = None


def build(source: Source, out: Path, settings: Settings, report=print) -> Manifest | None:
    """Builds, or continues, the shard set of `source` in `out`; returns at once where it is whole already.
    With a task it builds that share and returns None: `finalize` then makes the set whole.

    Raises UserError before anything is written when OUT holds something else; UserError or StoppedEarly later
    leave a build that the same call continues.
    """
    _check_out(out)
    job, identity = prepare(source, out, settings, report)
    whole = _already_whole(out, identity)
    if whole is not None:
        report(
            f"{out} is whole already: {whole.num_samples:,} samples in {len(whole.shards):,} shards, all of "
            f"the right size; `python -m data_prep verify {out}` reads them"
        )
        return whole
    created = not out.exists()
    build_state = build_state_of(job, identity)
    held = read_build_state(out)
    if held is None:
        write_build_state(out, build_state)
    else:
        _same_build(out, held.identity, identity, "an unfinished build of another set")
    if settings.task is not None:
        numbers = range(settings.task.index, job.plan.num_shards, settings.task.count)
        with lock(out, exclusive=False):
            run_shards(job, numbers, settings.workers)
        report(f"{out}: task {settings.task.index} of {settings.task.count} is done, {len(numbers):,} shards")
        return None
    try:
        with lock(out, exclusive=True):
            run_shards(job, range(job.plan.num_shards), settings.workers)
            manifest = finalize_build(out, build_state)
    except NothingUsable as error:
        shutil.rmtree(out if created else job.build_directory)
        raise UserError(str(error)) from None
    report(describe(out, manifest))
    return manifest


def describe(out: Path, manifest: Manifest) -> str:
    return (
        f"{out}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, "
        f"{sum(manifest.repairs.values()):,} repaired, {manifest.quarantined:,} quarantined"
        + (f" ({out / QUARANTINE} says why)" if manifest.quarantined else "")
    )


def prepare(source: Source, out: Path, settings: Settings, report=print) -> tuple[Job, dict[str, Any]]:
    """Plans, and says what will be done. Returns the job and the build's identity; writes nothing."""
    plan = ShardPlan(source.samples(), settings.seed, settings.shard_size)
    if not plan.num_shards:
        raise UserError(f"no readable image in SRC: {summarize(refused_entries(plan))}")
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
    needed = sum(estimated_bytes(job, number) for number in range(plan.num_shards))
    report(
        f"{source.kind} ({source.layout}): {plan.num_inputs:,} inputs{classes}, "
        f"{plan.source_bytes / 1e6:,.1f} MB -> {plan.num_shards:,} shards of {needed / 1e6:,.1f} MB in {out}"
    )
    if source.expected is not None and source.expected != plan.num_inputs:
        report(f"note: the data set as published has {source.expected:,} images")
    return job, identity


def run_shards(job: Job, numbers: range, workers: int) -> None:
    """Builds those of the shards `numbers` that are not finished."""
    missing = [n for n in numbers if read_record(job.directory, job.name(n), job.plan.sha256) is None]
    needed = sum(estimated_bytes(job, number) for number in missing)
    free = shutil.disk_usage(job.directory).free
    if free < needed:
        raise UserError(
            f"{job.directory}: the build needs about {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; "
            "make room and run the same command again"
        )
    if job.policy.resize is not None:
        load_resizer()
    progress = Progress(sum(job.plan.shard_inputs(number) for number in missing))
    try:
        build_shards(job, numbers, workers, progress.update)
    finally:
        progress.close()


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
    try:
        check_shard_files(out, manifest)
    except ShardSetError as error:
        raise UserError(f"{error}; to rebuild, remove {out} and run the same command") from None
    remove_build_directory(out)
    return manifest


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
