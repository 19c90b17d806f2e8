"""Makes a whole set of an unfinished build, once every shard of its plan is there.

Invariant: everything written here is a function of the build's ticket and the shards' records, so that it
does not matter which process finishes, nor who built which shard.

    .build/build.json   the ticket: what is built (`identity`), and what the plan knows that no shard does
    .build/SHARD.json   a shard's record
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.build_shard import Job, disk_full, quarantine_entry, read_record
from data_prep.dataset_card import write_card
from data_prep.errors import UserError
from data_prep.shard_plan import ShardPlan
from data_prep.shard_set import (
    BUILD_DIRECTORY,
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    WIDS,
    Manifest,
    ShardSetError,
    check_shard_files,
    idx_path,
    remove_leftovers,
    shard_name,
    store,
    tar_path,
    write_atomically,
    write_manifest,
)
from data_prep.stats import Stats

_TICKET = "build.json"
_NAMED = 3  # missing shards, or refused inputs, that a message lists


class NothingUsable(Exception):
    """Every input was refused: there is no set."""


@dataclass(frozen=True)
class BuildState:
    """identity: the manifest's fields that tell one build from another. refused: quarantine entries of inputs
    that are in no shard's plan. root: the source, for messages."""

    identity: dict[str, Any]
    num_shards: int
    inputs: int
    classes: list[str]
    class_names: list[str]
    rejected: list[dict[str, str]]


def refused_entries(plan: ShardPlan) -> list[dict[str, str]]:
    """Quarantine entries of the inputs that are in no shard's plan."""
    entries = []
    for item in plan.rejected:
        reason, _, detail = item.reason.partition(": ")
        entries.append(quarantine_entry(item.location, reason, detail))
    return entries


def summarize(quarantine: list[dict[str, str]]) -> str:
    """How many inputs were refused, for which reasons, with some examples: one line."""
    counts = Counter(entry["reason"] for entry in quarantine).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    examples = [f"{entry['member'] or entry['source']}: {entry['detail']}" for entry in quarantine[:_NAMED]]
    return f"{len(quarantine):,} inputs refused ({reasons}); for example {'; '.join(examples)}"


def build_state_of(job: Job, identity: dict[str, Any]) -> BuildState:
    classes = job.source.classes
    return BuildState(
        identity,
        job.plan.num_shards,
        job.plan.num_inputs,
        list(classes.names),
        list(classes.readable),
        refused_entries(job.plan),
    )


def read_build_state(out: Path) -> BuildState | None:
    """None where OUT holds no unfinished build. Raises UserError when it can't be read."""
    path = out / BUILD_DIRECTORY / _TICKET
    try:
        return BuildState(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} can't be read: remove {out} and build again") from None


def write_build_state(out: Path, build_state: BuildState) -> None:
    try:
        (out / BUILD_DIRECTORY).mkdir(parents=True, exist_ok=True)
        write_atomically(out / BUILD_DIRECTORY / _TICKET, json.dumps(asdict(build_state)).encode())
    except OSError as error:
        raise UserError(f"OUT {out} can't be written: {error.strerror}") from None


def finalize_build(out: Path, build_state: BuildState) -> Manifest:
    """Writes quarantine, card and, last, the manifest. Raises UserError when a shard is missing,
    NothingUsable when no input was fit for any."""
    shards, stats, quarantine, missing = [], Stats(), list(build_state.rejected), []
    for entry in build_state.rejected:
        stats.quarantine[entry["reason"]] += 1
    for number in range(build_state.num_shards):
        name = shard_name(build_state.identity["source"], build_state.identity["split"], number)
        record = read_record(out, name, build_state.identity["plan_sha256"])
        if record is None:
            missing.append(name)
            continue
        stats.merge(record.stats)
        quarantine += record.quarantine
        if record.shard is not None:
            shards.append(record.shard)
    if missing:
        names = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise UserError(
            f"OUT {out}: {len(missing):,} of {build_state.num_shards:,} shards are not built yet ({names}); "
            "run the build, or those of its array tasks that failed, again"
        )
    if not shards:
        raise NothingUsable(f"no readable image in SRC: {summarize(quarantine)}")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        **build_state.identity,
        inputs=build_state.inputs,
        quarantined=len(quarantine),
        repairs=dict(sorted(stats.repairs.items())),
        classes=tuple(build_state.classes),
        class_names=tuple(build_state.class_names),
        shards=tuple(shards),
    )
    try:
        check_shard_files(out, manifest)
        with ThreadPoolExecutor(1) as disk:
            stored = disk.submit(store_shards, out, [shard.name for shard in manifest.shards])
            lines = "".join(json.dumps(entry) + "\n" for entry in quarantine)
            write_atomically(out / QUARANTINE, lines.encode())
            write_atomically(out / WIDS, _wids(manifest))
            write_card(out, manifest, stats)
            stored.result()
        write_manifest(out, manifest)
    except ShardSetError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise disk_full(out, error) from None
    remove_build_directory(out)
    return manifest


def store_shards(out: Path, names: Iterable[str]) -> None:
    """Waits until the disk has them: a manifest must not outlive its shards when the power fails."""
    for name in names:
        store(tar_path(out, name))
        store(idx_path(out, name))


def finalize(out: Path) -> Manifest | None:
    """For builds by array tasks. None when OUT is whole already. Raises UserError and ShardSetError."""
    build_state = read_build_state(out)
    if (out / MANIFEST).exists():
        remove_build_directory(out)
        return None
    if build_state is None:
        raise UserError(f"OUT {out} holds no unfinished build; the build's own command begins one")
    with lock(out, exclusive=True):
        try:
            return finalize_build(out, build_state)
        except NothingUsable as error:
            raise UserError(str(error)) from None


@contextlib.contextmanager
def lock(out: Path, exclusive: bool) -> Iterator[None]:
    """Keeps other builds out of the directory (array tasks share it), where the file system has locks."""
    with open(out / BUILD_DIRECTORY / "lock", "w") as file:
        os.register_at_fork(
            after_in_child=file.close
        )  # the lock ends with this process, not with a stray worker
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"OUT {out} is being built by another process") from None
        except OSError:
            pass
        if exclusive:
            remove_leftovers(out)
        yield


def remove_build_directory(out: Path) -> None:
    shutil.rmtree(out / BUILD_DIRECTORY, ignore_errors=True)


def _wids(manifest: Manifest) -> bytes:
    shards = [
        {"url": f"{shard.name}.tar", "nsamples": shard.samples, "filesize": shard.bytes}
        for shard in manifest.shards
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    return (json.dumps(index, indent=1) + "\n").encode()
