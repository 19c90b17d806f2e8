"""Build a complete shard set from a source: plan, build the missing shards, finalize.

Invariant: OUT is absent or empty, an unfinished build of one plan (it has a .build directory), or a complete
set (it has a manifest). Every step may be interrupted at any point and repeated; the set's bytes depend neither
on interruptions nor on the number of workers and array tasks.
"""

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import finalize, shard_set
from data_prep.build_shard import BuildJob
from data_prep.errors import UserError
from data_prep.images import Policy
from data_prep.pixels import load_resizer
from data_prep.progress import Progress
from data_prep.shard_plan import ShardPlan, ShardSize
from data_prep.shard_set import Manifest
from data_prep.sources.sample import Source
from data_prep.workers import run_in_workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArrayTask:
    """Share `index` (from 0) of `count` shares of a build: every count-th shard."""

    index: int
    count: int


@dataclass(frozen=True)
class Settings:
    """Settings of a build; `workers` (processes) and `task` do not affect the set's bytes."""

    split: str
    seed: int
    shard_size: ShardSize
    policy: Policy
    workers: int
    task: ArrayTask | None = None


def build(source: Source, out: Path, settings: Settings) -> None:
    """Build or continue the shard set of `source` in `out`, and print what was done.

    With `settings.task`, only that share is built; finalize() completes the set. A complete set is left as it
    is. After an error or interruption, the same call continues the build.

    Raises:
        UserError: If OUT holds something else (nothing is written then), or the source or the disk fails.
        StoppedEarly: If a signal stopped the build or a worker was killed.
    """
    _check_out_directory(out)
    job, identity = plan_build(source, out, settings)
    complete = _read_complete_set(out, identity)
    if complete is not None:
        print(
            f"{out} is already complete: {complete.num_samples:,} samples in {len(complete.shards):,} shards "
            f"of the right size; `python -m data_prep verify {out}` checks their content"
        )
        return
    is_new = not out.exists()
    build_state = finalize.make_build_state(job, identity)
    existing = finalize.read_build_state(out)
    if existing is None:
        finalize.write_build_state(out, build_state)
    else:
        _check_same_build(out, existing.identity, identity, "an unfinished build of another set")
    if settings.task is not None:
        task = settings.task
        numbers = range(task.index, job.plan.num_shards, task.count)
        with finalize.lock_build(out, exclusive=False):
            _build_missing_shards(job, numbers, settings.workers)
        print(f"{out}: task {task.index} of {task.count} is done, {len(numbers):,} shards")
        return
    try:
        with finalize.lock_build(out, exclusive=True):
            _build_missing_shards(job, range(job.plan.num_shards), settings.workers)
            manifest = finalize.finalize_build(out, build_state)
    except finalize.NoUsableInput:
        shutil.rmtree(out if is_new else out / shard_set.BUILD_DIRECTORY)
        raise
    print_summary(out, manifest)


def print_summary(out: Path, manifest: Manifest) -> None:
    print(
        f"{out}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, "
        f"{sum(manifest.repairs.values()):,} repaired, {manifest.quarantined:,} quarantined"
        + (f" (reasons in {out / shard_set.QUARANTINE})" if manifest.quarantined else "")
    )


def plan_build(source: Source, out: Path, settings: Settings) -> tuple[BuildJob, dict[str, Any]]:
    """Plan a build and print the plan; write nothing. Returns the job and the build's identity.

    Raises:
        UserError: If the source cannot be read or all its inputs are rejected.
    """
    if settings.policy.resize is not None and source.classes.annotation == "label_map":
        raise UserError("--resize: label maps are stored unchanged, and their images have to keep their size; omit it")
    plan = ShardPlan(source.samples(), settings.seed, settings.shard_size)
    notes = source.notes()
    if not plan.num_shards:
        raise UserError(f"no usable image in SRC: {finalize.summarize(plan.rejected)}")
    job = BuildJob(plan, source, settings.policy, out, settings.split)
    options = {**asdict(settings.policy), "shard_samples": settings.shard_size.samples}
    options |= {"shard_bytes": settings.shard_size.bytes, "layout": source.layout}
    if source.annotations_digest:
        options["annotations"] = source.annotations_digest
    identity = {"source": source.kind, "split": settings.split, "seed": settings.seed}
    identity |= {"options": options, "plan_sha256": plan.sha256}
    classes = f", {len(source.classes.names):,} classes" if source.classes.names else ""
    needed = sum(map(job.estimate_bytes, range(plan.num_shards)))
    print(
        f"{source.kind} ({source.layout}): {plan.num_inputs:,} inputs{classes}, "
        f"{plan.source_bytes / 1e6:,.1f} MB -> {plan.num_shards:,} shards of {needed / 1e6:,.1f} MB in {out}"
    )
    if source.expected is not None and source.expected != plan.num_inputs:
        print(f"note: the data set as published has {source.expected:,} images")
    for note in notes:
        print(f"note: {note}")
    return job, identity


def _build_missing_shards(job: BuildJob, numbers: range, workers: int) -> None:
    missing = [number for number in numbers if job.read_record(number) is None]
    staging = job.source.staging_job(job.directory) if missing else None
    to_stage = staging.missing() if staging is not None else []
    needed = sum(map(job.estimate_bytes, missing)) + sum(staging.estimate_bytes(i) for i in to_stage if staging)
    free = shutil.disk_usage(job.directory).free
    if free < needed:
        raise UserError(
            f"{job.directory}: the build needs about {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; "
            "free some space and run the same command again"
        )
    if staging is not None and to_stage:
        logger.info(f"copying the images of {len(to_stage):,} parquet files, to read them at random")
        # Array tasks begin with different files; each of them needs all.
        first = numbers.start * len(to_stage) // max(1, numbers.step)
        to_stage = to_stage[first:] + to_stage[:first]
        progress = Progress(sum(staging.num_rows[i] for i in to_stage))
        try:
            run_in_workers(staging, to_stage, workers, progress.update)
        finally:
            progress.close()
    if job.policy.resize is not None:
        load_resizer()
    progress = Progress(sum(map(job.plan.count_inputs, missing)))
    try:
        run_in_workers(job, numbers, workers, progress.update)
    finally:
        progress.close()


def _check_out_directory(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"OUT {out}: is a file, not a directory")
    if (out / shard_set.BUILD_DIRECTORY / shard_set.ADOPTION_STATE).exists():
        raise UserError(f"OUT {out}: its tars are being adopted; choose another directory")
    is_set = any((out / name).exists() for name in (shard_set.MANIFEST, shard_set.BUILD_DIRECTORY))
    if not is_set and any(out.iterdir()):
        raise UserError(f"OUT {out}: is not empty and no shard set; choose another directory")


def _read_complete_set(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """Return the manifest if `out` is complete. Raises UserError if it is another set or lacks files."""
    if not (out / shard_set.MANIFEST).exists():
        return None
    manifest = shard_set.read_manifest(out)
    existing = {name: getattr(manifest, name) for name in identity}
    _check_same_build(out, existing, identity, "another shard set")
    try:
        shard_set.check_shard_files(out, manifest)
    except shard_set.ShardSetError as error:
        raise UserError(f"{error}; to build it again, remove {out} and run the same command") from error
    finalize.remove_build_directory(out)
    return manifest


def _check_same_build(out: Path, existing: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    if existing == wanted:
        return
    flat_existing, flat_wanted = ({**d, **d.get("options", {})} for d in (existing, wanted))
    for name, value in flat_wanted.items():
        if name not in ("options", "plan_sha256") and flat_existing.get(name) != value:
            difference = f"{name} {flat_existing.get(name)!r}, not {value!r}"
            break
    else:
        difference = "its source had other files"
    raise UserError(f"OUT {out}: holds {what} ({difference}); choose another directory")
