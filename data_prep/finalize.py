"""Complete an unfinished build once every shard of its plan is built.

Invariant: everything written here is a function of the build state and the shards' records, so it does not
matter which process finalizes, or which built which shard.

    .build/build.json   the build state
    .build/SHARD.json   a shard's record
"""

import contextlib
import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep import shard_set
from data_prep.atomic import atomic_write, fsync_path
from data_prep.build_shard import BuildJob, read_record, write_error
from data_prep.dataset_card import write_card
from data_prep.errors import UserError
from data_prep.shard_set import Annotation, Manifest
from data_prep.stats import Stats

logger = logging.getLogger(__name__)

_MAX_LISTED = 3  # missing shards, or rejected inputs, in a message


class NoUsableInput(UserError):
    """Every input was rejected, so there is no set."""


@dataclass(frozen=True)
class BuildState:
    """Identity of a build, and the facts of its plan that the records of the shards lack."""

    identity: dict[str, Any]  # the manifest's fields that distinguish one build from another
    num_shards: int
    inputs: int
    classes: list[str]
    class_names: list[str]
    rejected: list[dict[str, str]]  # quarantine entries of the inputs that are in no shard
    annotation: Annotation = "label"
    category_ids: list[int] = field(default_factory=list)


def summarize(quarantine: list[dict[str, str]]) -> str:
    """Summarize in one line how many inputs were rejected and why, with some examples."""
    if not quarantine:
        return "it is empty"
    counts = Counter(entry["reason"] for entry in quarantine).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    listed = [f"{entry['member'] or entry['source']}: {entry['detail']}" for entry in quarantine[:_MAX_LISTED]]
    return f"{len(quarantine):,} inputs rejected ({reasons}); for example {'; '.join(listed)}"


def make_build_state(job: BuildJob, identity: dict[str, Any]) -> BuildState:
    plan, classes = job.plan, job.source.classes
    names, readable = list(classes.names), list(classes.readable)
    return BuildState(
        identity,
        plan.num_shards,
        plan.num_inputs,
        names,
        readable,
        plan.rejected,
        classes.annotation,
        list(classes.category_ids),
    )


def _build_state_path(out: Path) -> Path:
    return out / shard_set.BUILD_DIRECTORY / "build.json"


def read_build_state(out: Path) -> BuildState | None:
    """Read the state of the unfinished build in `out`; None if there is none. Raises UserError if damaged."""
    path = _build_state_path(out)
    try:
        document = json.loads(path.read_bytes())
        if "refused" in document:  # the former name of the field
            document["rejected"] = document.pop("refused")
        return BuildState(**document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read; remove {out} and build again") from error


def write_build_state(out: Path, build_state: BuildState) -> None:
    """Create the build directory and write the build state. Raises UserError if that fails."""
    path = _build_state_path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(asdict(build_state)).encode())
    except OSError as error:
        raise UserError(f"OUT {out}: cannot be written: {error.strerror}; choose another directory") from error


def finalize_build(out: Path, build_state: BuildState) -> Manifest:
    """Write quarantine, card and, last, the manifest. The caller holds the lock.

    Raises:
        NoUsableInput: If no shard has a sample.
        UserError: If a shard is missing or the disk is full.
    """
    identity = build_state.identity
    shards, stats, quarantine, missing = [], Stats(), list(build_state.rejected), []
    for entry in build_state.rejected:
        stats.quarantine[entry["reason"]] += 1
    for number in range(build_state.num_shards):
        name = shard_set.shard_name(identity["source"], identity["split"], number)
        record = read_record(out, name, identity["plan_sha256"])
        if record is None:
            missing.append(name)
            continue
        stats.merge(record.stats)
        quarantine += record.quarantine
        if record.shard is not None:
            shards.append(record.shard)
    if missing:
        names = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
        raise UserError(
            f"OUT {out}: {len(missing):,} of {build_state.num_shards:,} shards are not built yet ({names}); "
            "run the build, or its failed array tasks, again"
        )
    if not shards:
        raise NoUsableInput(f"no usable image in SRC: {summarize(quarantine)}")
    manifest = Manifest(
        format_version=shard_set.FORMAT_VERSION,
        **identity,
        inputs=build_state.inputs,
        quarantined=len(quarantine),
        repairs=dict(sorted(stats.repairs.items())),
        classes=tuple(build_state.classes),
        class_names=tuple(build_state.class_names),
        shards=tuple(shards),
        annotation=build_state.annotation,
        category_ids=tuple(build_state.category_ids),
    )
    for line in _describe_losses(manifest, stats):
        logger.warning(line)
    write_set(out, manifest, quarantine, stats)
    return manifest


def write_set(out: Path, manifest: Manifest, quarantine: list[dict[str, str]], stats: Stats) -> None:
    """Write quarantine, card and, last, the manifest; then remove the build directory. The caller holds the lock.

    Raises:
        UserError: If a shard is missing or the disk is full.
    """
    try:
        shard_set.check_shard_files(out, manifest)
        with ThreadPoolExecutor(1) as pool:
            fsync = pool.submit(_fsync_shards, out, manifest)
            lines = "".join(json.dumps(entry) + "\n" for entry in quarantine)
            atomic_write(out / shard_set.QUARANTINE, lines.encode())
            if not manifest.is_adopted:  # the wids library would count the unusable samples, too
                atomic_write(out / shard_set.WIDS, _wids_index(manifest))
            write_card(out, manifest, stats)
            fsync.result()
        shard_set.write_manifest(out, manifest)
    except OSError as error:
        raise write_error(out, error) from error
    remove_build_directory(out)


def _describe_losses(manifest: Manifest, stats: Stats) -> Iterator[str]:
    """Yield a line per kind of loss that quarantine.jsonl does not show."""
    empty = [name for label, name in enumerate(manifest.classes) if not stats.labels[str(label)]]
    if empty and manifest.annotation != "instances":
        names = ", ".join(empty[:_MAX_LISTED]) + (", ..." if len(empty) > _MAX_LISTED else "")
        yield f"{len(empty):,} of {len(manifest.classes):,} classes have no image: {names}"
    for name, count in sorted(stats.unreadable.items()):
        yield f"metadata: {count:,} {name} left out"


def _fsync_shards(out: Path, manifest: Manifest) -> None:
    """Flush the shards to disk: after a power failure, a manifest must not exist without its shards."""
    for shard in manifest.shards:
        fsync_path(shard_set.tar_path(out, shard))
        fsync_path(shard_set.idx_path(out, shard))


def finalize(out: Path) -> Manifest | None:
    """Complete a build by array tasks; return None if it is complete already. Raises UserError if it cannot."""
    build_state = read_build_state(out)
    if (out / shard_set.MANIFEST).exists():
        remove_build_directory(out)
        return None
    if build_state is None:
        raise UserError(f"OUT {out}: no unfinished build; run the command that builds its shards")
    with lock_build(out, exclusive=True):
        return finalize_build(out, build_state)


@contextlib.contextmanager
def lock_build(out: Path, exclusive: bool) -> Iterator[None]:
    """Lock an unfinished build if the file system has locks. Raises UserError if another process holds it."""
    # fcntl and not filelock: array tasks share the lock, which filelock does not support. lockf and not flock:
    # workers do not inherit the lock, so it is released when this process ends, even if a worker is left.
    with open(out / shard_set.BUILD_DIRECTORY / "lock", "w+") as file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            raise UserError(f"OUT {out}: another process is building or adopting it; wait until it ends") from error
        except OSError:
            pass  # no locks on this file system
        if exclusive:
            shard_set.remove_temporary_files(out)
        yield


def remove_build_directory(out: Path) -> None:
    shutil.rmtree(out / shard_set.BUILD_DIRECTORY, ignore_errors=True)


def _wids_index(manifest: Manifest) -> bytes:
    shards = [
        {"url": f"{shard.name}.tar", "nsamples": shard.samples, "filesize": shard.bytes} for shard in manifest.shards
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    return (json.dumps(index, indent=1) + "\n").encode()
