"""Adopt a folder of WebDataset tars: index them in place and make the folder a shard set.

Invariant: no tar is modified. Index, manifest and quarantine depend only on the tars and the options, not on
interruptions, workers and array tasks. The manifest is written last. As long as an adoption is unfinished, .build/
holds its state:

    .build/.adopt.json   tars and options
    .build/NAME.json     record of a finished tar
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import finalize, shard_set
from data_prep.adopt_tar import AdoptJob
from data_prep.atomic import atomic_write
from data_prep.builder import ArrayTask, print_summary
from data_prep.errors import UserError
from data_prep.images import Policy
from data_prep.labels import LabelRule, find_classes, parse_label_options
from data_prep.progress import Progress
from data_prep.shard_set import Manifest, ShardSetError
from data_prep.sources.webdataset_files import check_readable_in_place, list_tars, peek_labels
from data_prep.stats import Stats
from data_prep.workers import run_in_workers

logger = logging.getLogger(__name__)

REENCODE_SHARE = 0.01
"""Share of samples that need re-encoding above which another command is suggested."""

_WRITTEN = (shard_set.QUARANTINE, shard_set.CARD, shard_set.CARD_JSON, shard_set.CONTACT_SHEET)


@dataclass(frozen=True)
class Adoption:
    """Tars and options of an adoption.

    Attributes:
        split: Name of the split, for the manifest.
        check, max_pixels: As in `Policy`.
        labels, label_key: As in `LabelRule`.
        tars: Name without ".tar", and bytes of each tar, ordered by name.
    """

    split: str
    check: str
    max_pixels: int
    labels: str
    label_key: str | None
    tars: tuple[tuple[str, int], ...]

    @property
    def label_rule(self) -> LabelRule:
        return LabelRule(self.labels, self.label_key)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """The manifest's fields that distinguish one adoption from another."""
        options = {"check": self.check, "max_pixels": self.max_pixels, **self.label_rule.to_options()}
        identity = {"source": shard_set.ADOPTED, "split": self.split, "seed": 0, "options": options}
        return identity | {"plan_sha256": self.sha256}

    def job(self, directory: Path) -> AdoptJob:
        policy = Policy(self.check, "ignore", max_pixels=self.max_pixels)
        return AdoptJob(directory, tuple(name for name, _ in self.tars), policy, self.label_rule, self.sha256)


def adopt(
    directory: Path,
    split: str,
    policy: Policy,
    labels: str,
    label_key: str | None,
    workers: int,
    task: ArrayTask | None = None,
) -> None:
    """Adopt the tars of a folder, or continue to, and print what was done.

    With `task`, only every count-th tar is read; `finalize_adoption` completes the set. A complete set is left as it
    is if its tars and options are the same; otherwise it is adopted again.

    Args:
        labels, label_key: The options of the same names; see `parse_label_options`.

    Raises:
        UserError: If the folder holds no tars or another shard set, a tar cannot be read, or no sample is usable.
        StoppedEarly: If a signal stopped the adoption or a worker was killed.
    """
    adoption = _plan(directory, split, policy, labels, label_key)
    had_manifest = (directory / shard_set.MANIFEST).exists()
    if _is_complete(directory, adoption):
        return
    try:
        _state_path(directory).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written: {error.strerror}; "
            f"`python -m data_prep webdataset {directory} OUT` builds a set elsewhere"
        ) from error
    job, num_tars = adoption.job(directory), len(adoption.tars)
    numbers = range(num_tars) if task is None else range(task.index, num_tars, task.count)
    with finalize.lock_build(directory, exclusive=task is None):
        if not had_manifest and _is_complete(directory, adoption):  # by another process in the meantime
            return
        _begin(directory, adoption)
        progress = Progress(None)
        try:
            run_in_workers(job, numbers, workers, progress.update)
        finally:
            progress.close()
        if task is None:
            _finalize(directory, adoption)
            return
    print(f"{directory}: task {task.index} of {task.count} is done, {len(numbers):,} tars")


def _begin(directory: Path, adoption: Adoption) -> None:
    """Write the state, then remove what an earlier adoption of other tars or options has written."""
    state_path = _state_path(directory)
    removed = {path.name.removesuffix(".json") for path in state_path.parent.glob("*.json")}
    with contextlib.suppress(ShardSetError):  # there is no manifest
        removed |= {shard.name for shard in shard_set.read_manifest(directory).shards}
    removed -= {name for name, _ in adoption.tars}
    try:
        atomic_write(state_path, json.dumps(asdict(adoption)).encode())
        for name in removed:
            shard_set.idx_path(directory, name).unlink(missing_ok=True)
        for name in (shard_set.MANIFEST, *_WRITTEN):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise finalize.write_error(directory, error) from error


def is_adoption(directory: Path) -> bool:
    """Return whether a folder has an unfinished adoption."""
    return _state_path(directory).exists()


def finalize_adoption(directory: Path) -> None:
    """Complete an adoption by array tasks. Raises UserError if tars are missing."""
    path = _state_path(directory)
    try:
        document = json.loads(path.read_bytes())
        document["tars"] = tuple(map(tuple, document["tars"]))
        adoption = Adoption(**document)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read; remove {path.parent} and adopt again") from error
    with finalize.lock_build(directory, exclusive=True):
        if not _is_complete(directory, adoption):  # a kill may have left a part of the build directory
            _finalize(directory, adoption)


def _state_path(directory: Path) -> Path:
    return directory / shard_set.BUILD_DIRECTORY / shard_set.ADOPTION_STATE


def _plan(directory: Path, split: str, policy: Policy, labels: str, label_key: str | None) -> Adoption:
    tars = list_tars(directory)
    for path in tars:
        check_readable_in_place(path)
    rule = peek_labels(tars, parse_label_options(labels, label_key))
    sizes = tuple((path.name.removesuffix(".tar"), path.stat().st_size) for path in tars)
    num_bytes = sum(size for _, size in sizes)
    source = f"json key {rule.key!r}" if rule.source == "json" else rule.source
    print(f"{directory}: {len(tars):,} tars, {num_bytes / 1e6:,.1f} MB; labels: {source}")
    return Adoption(split, policy.check, policy.max_pixels, rule.source, rule.key, sizes)


def _is_complete(directory: Path, adoption: Adoption) -> bool:
    """Return whether the set is complete. Raises UserError if the folder holds something that must not be replaced."""
    if not (directory / shard_set.MANIFEST).exists():
        foreign = [name for name in _WRITTEN if (directory / name).exists()]
        if foreign and not is_adoption(directory):
            raise UserError(f"{directory / foreign[0]}: would be replaced; move it away")
        return False
    manifest = shard_set.read_manifest(directory)
    if not manifest.is_adopted:
        raise UserError(f"{directory}: is already a shard set, built from {manifest.source}; train on it as it is")
    if {name: getattr(manifest, name) for name in adoption.identity} != adoption.identity:
        logger.info(f"{directory}: tars or options have changed, adopting again")
        return False
    try:
        shard_set.check_shard_files(directory, manifest)
    except ShardSetError as error:
        logger.info(f"{error}; adopting again")
        return False
    completed = (directory / shard_set.MANIFEST).stat().st_mtime_ns
    if any(shard_set.tar_path(directory, name).stat().st_mtime_ns > completed for name, _ in adoption.tars):
        logger.info(f"{directory}: tars are newer than {shard_set.MANIFEST}, adopting again")
        return False
    finalize.remove_build_directory(directory)
    print(f"{directory} is already complete: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards")
    return True


def _finalize(directory: Path, adoption: Adoption) -> None:
    """Write quarantine, card and manifest, and print a summary. The caller holds the lock."""
    job, shards, quarantine, stats = adoption.job(directory), [], [], Stats()
    missing = []
    for number, name in enumerate(job.names):
        record = job.read_record(number)
        if record is None:
            missing.append(f"{name}.tar")
            continue
        stats.merge(record.stats)
        quarantine += record.quarantine
        if record.shard is not None:
            shards.append(record.shard)
    if missing:
        raise UserError(
            f"{directory}: {len(missing):,} of {len(job.names):,} tars are not indexed yet ({missing[0]}, ...); "
            "run `adopt`, or its failed array tasks, again"
        )
    if not shards:
        finalize.remove_build_directory(directory)
        raise UserError(
            f"{directory}: no usable sample: {finalize.summarize(quarantine)}{_advise_rebuild(directory, stats, 0)}"
        )
    try:
        classes = find_classes(stats.labels)
    except ValueError as error:
        raise UserError(f"{directory}: {error}; run `adopt` with --labels none, or another --label-key") from error
    positions = {label: str(position) for position, label in enumerate(classes)}
    stats = dataclasses.replace(
        stats, labels=Counter({positions[label]: count for label, count in stats.labels.items()})
    )
    num_samples = sum(shard.samples for shard in shards)
    manifest = Manifest(
        format_version=shard_set.FORMAT_VERSION,
        **adoption.identity,
        inputs=num_samples + len(quarantine),
        quarantined=len(quarantine),
        repairs={},
        classes=classes,
        class_names=(),
        shards=tuple(shards),
    )
    finalize.write_set(directory, manifest, quarantine, stats)
    print_summary(directory, manifest)
    if classes:
        print(f"{len(classes):,} classes: {', '.join(classes[:3])}" + (", ..." if len(classes) > 3 else ""))
    damaged = [entry["source"] for entry in quarantine if entry["reason"] == "damaged_tar"]
    if damaged:
        print(
            f"{len(damaged):,} tars are damaged or truncated, and their last samples missing: {', '.join(damaged[:3])}"
        )
    if advice := _advise_rebuild(directory, stats, num_samples):
        print(advice.removeprefix("; "))


def _advise_rebuild(directory: Path, stats: Stats, num_samples: int) -> str:
    """Return the advice to rebuild the tars if more than REENCODE_SHARE of the samples need it, else ""."""
    count = stats.quarantine["needs_reencoding"]
    if count <= REENCODE_SHARE * (num_samples + count):
        return ""
    share = count / (num_samples + count)
    return (
        f"; {count:,} samples ({share:.1%}, more than {REENCODE_SHARE:.0%}) need re-encoding: "
        f"`python -m data_prep webdataset {directory} OUT` builds a set with them"
    )
