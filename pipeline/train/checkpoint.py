"""Checkpoints on disk.

    checkpoints/
        latest                    name of the newest valid checkpoint; replaced atomically, last
        step-00001000/            complete, because it has its final name
            state.json            step, data offset, ...; size and SHA-256 of every file; a checksum of itself
            rank-00000.safetensors    one rank's part of fp32 weights and optimizer state: sharded_state.py
            engine.json               scalars of the engine
            weights.safetensors       the fp32 weights, for everything but resuming
            weights_ema.safetensors   their EMA (train.ema_decay)
        step-00003000.damaged/    was damaged when the run resumed from an earlier one
        step-00002000.partial/    being written, or left by a killed run; never read, removed at the next start

Invariant: a directory gets its final name only when all its files are on disk and listed in its state.json. So a
checkpoint with that name is complete whenever the run was killed, and later damage is detected before it is read.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from pipeline.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    os_error_to_user_error,
    raise_on_all_ranks,
)
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.io.atomic import atomic_write
from pipeline.recipe.sections import TrainSection

logger = logging.getLogger(__name__)
T = TypeVar("T")
STATE = "state.json"
SCHEDULED = "scheduled"
LATEST = "latest"
NAME = re.compile(r"step-(\d{8})")
PARTIAL = ".partial"
DAMAGED = ".damaged"
RENAMED = {"window": "metrics", "unmeasured": "eval_failed"}
"""Keys of state.json in earlier versions."""


def save(
    write_part: Callable[[Path], None],
    write_shared: Callable[[Path], None],
    directory: Path,
    step: int,
    state: dict,
    retention: TrainSection,
    dist_info: DistInfo,
) -> None:
    """Write, hash and publish the checkpoint of `step`. Collective.

    Args:
        write_part: Writes this rank's files into a directory; called on every rank.
        write_shared: Writes the other files, after all parts; called on rank 0.
        directory: The run's checkpoints directory.
        state: Goes to state.json.
        retention: Decides which older checkpoints are deleted.

    Raises:
        AllRanksError: If a rank cannot write. The partial checkpoint is removed, earlier ones stay.
    """
    partial = directory / (checkpoint_name(step) + PARTIAL)
    rank, world_size = dist_info.rank, dist_info.world_size

    def on_all_ranks(function: Callable[[], T]) -> list[T]:
        """Return the results of all ranks."""
        result, failure, cause = None, None, None
        try:
            result = function()
        except (OSError, SafetensorError) as error:
            failure, cause = str(error), error
        results = all_gather_object((result, failure))
        failures = [text for _, text in results if text]
        if not failures:
            return [result for result, _ in results]  # pyright: ignore[reportReturnType] (nothing failed)
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise AllRanksError(
            f"{directory}: checkpoint of step {step} cannot be written: {failures[0]}{_free_space(directory.parent)}; "
            f"{_earlier_checkpoints(directory)}; {_fix(failures[0])} and run the same command again"
        ) from cause

    def write_and_list() -> list[str]:
        if rank:
            return []
        write_shared(partial)
        return list_files(partial)

    on_all_ranks(lambda: partial.mkdir(parents=True, exist_ok=True))
    on_all_ranks(lambda: write_part(partial))
    files = on_all_ranks(write_and_list)[0]
    parts = on_all_ranks(lambda: fsync_and_hash(partial, files[rank::world_size]))
    hashed = {name: entry for part in parts for name, entry in part.items()}
    complete = {"step": step, **state, "files": hashed}
    on_all_ranks(lambda: publish(directory, step, complete, retention) if rank == 0 else None)


def latest_valid_checkpoint(
    directory: Path, rank: int = 0, world_size: int = 1, at_most: int | None = None
) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none. Collective; ranks share the hashing.

    Args:
        at_most: Ignore later steps.

    Raises:
        AllRanksError: If all checkpoints are damaged or missing. Starting over would overwrite what may be repaired.
    """
    steps, has_latest = broadcast_object(
        raise_on_all_ranks(lambda: _list_checkpoints(directory) if rank == 0 else ([], False))
    )

    def verify(checkpoint: Path) -> list[str]:
        parts = all_gather_object(_verify(checkpoint, lambda files: files[rank::world_size]))
        return [problem for part in parts for problem in part]

    return _latest_valid(directory, [step for step in steps if at_most is None or step <= at_most], has_latest, verify)


def latest_checkpoint_with(directory: Path, file: str) -> Path | None:
    """Like `latest_valid_checkpoint`, but verifies one file on this rank only (not collective)."""
    try:
        return _latest_valid(
            directory, *_list_checkpoints(directory), lambda checkpoint: _verify(checkpoint, lambda _: [file])
        )
    except AllRanksError as error:  # raised by this rank only
        raise UserError(str(error)) from error
    except OSError as error:
        raise os_error_to_user_error(error) from error


def _list_checkpoints(directory: Path) -> tuple[list[int], bool]:
    """Return the steps of the checkpoints, oldest first, and whether `latest` exists."""
    return checkpoint_steps(directory), (directory / LATEST).exists()


def _latest_valid(
    directory: Path, steps: list[int], has_latest: bool, verify: Callable[[Path], list[str]]
) -> Path | None:
    latest = directory / LATEST
    if has_latest and not steps:
        raise AllRanksError(
            f"{latest}: points to a missing checkpoint; restore it, or delete {latest} to restart from step 0"
        )
    for step in reversed(steps):
        checkpoint = directory / checkpoint_name(step)
        if not (problems := verify(checkpoint)):
            return checkpoint
        logger.warning(f"{checkpoint.name} is damaged ({problems[0]}); trying the previous one")
    if steps:
        raise AllRanksError(
            f"{directory}: every checkpoint is damaged; restore one, or delete all to restart from step 0"
        )
    return None


def _verify(checkpoint: Path, select: Callable[[list[str]], list[str]]) -> list[str]:
    """Return the problems of the selected files."""
    try:
        return verify_files(checkpoint, select(sorted(read_state(checkpoint)["files"])))
    except (ValueError, OSError) as error:
        return [str(error)]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_steps(directory: Path) -> list[int]:
    """Return the steps of the checkpoints with a final name, oldest first.

    Raises:
        OSError: If the directory exists and cannot be read.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(NAME.fullmatch, names) if match)


def list_files(checkpoint: Path) -> list[str]:
    """Return the relative paths that a checkpoint's state.json lists, sorted."""
    paths = (p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
    return sorted(path for path in paths if path != STATE)


def fsync_and_hash(checkpoint: Path, files: list[str]) -> dict[str, dict]:
    """Force files to the disk. Returns {path: {"bytes", "sha256"}}."""
    hashed = {}
    for name in files:
        with open(checkpoint / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashed[name] = {"bytes": file.tell(), "sha256": digest}
    return hashed


def publish(directory: Path, step: int, state: dict, retention: TrainSection) -> Path:
    """Give the partial checkpoint of `step` its final name, update `latest`, and delete old checkpoints.

    Args:
        state: Goes to state.json, and must have "files", the result of `fsync_and_hash` for every file.
    """
    partial, final = directory / (checkpoint_name(step) + PARTIAL), directory / checkpoint_name(step)
    write_state(partial, {**state, SCHEDULED: step % retention.checkpoint_every == 0})
    _fsync_directory(partial)
    if final.exists():  # a damaged one; the run resumed from an earlier one
        _remove(final)
    partial.rename(final)
    _fsync_directory(directory)
    atomic_write(directory / LATEST, final.name)
    skips = (state.get("guard") or {}).get("consecutive_skips")
    scheduled = scheduled_checkpoint_steps(directory, retention.checkpoint_every)
    for old in checkpoints_to_delete(checkpoint_steps(directory), scheduled, retention, skips[0] if skips else None):
        _remove(directory / checkpoint_name(old))
    return final


def scheduled_checkpoint_steps(directory: Path, every: int) -> list[int]:
    """Return the steps of the checkpoints that train.checkpoint_every made, oldest first.

    Args:
        every: The present schedule, used for checkpoints that do not record it.
    """

    def is_scheduled(step: int) -> bool:
        try:
            return read_state(directory / checkpoint_name(step))[SCHEDULED]
        except (ValueError, KeyError):  # damaged, or of an earlier version
            return step % every == 0

    return [step for step in checkpoint_steps(directory) if is_scheduled(step)]


def checkpoints_to_delete(
    steps: list[int], scheduled: list[int], retention: TrainSection, first_skipped: int | None
) -> list[int]:
    """Return the steps of the checkpoints that retention does not keep.

    Scheduled checkpoints and the newest one are kept as train.keep_checkpoints says. Those that a signal made only
    fill up this number, so that the target of a rollback does not depend on interruptions.

    Args:
        steps: All steps, oldest first.
        scheduled: Those of the schedule, oldest first.
        first_skipped: The first of the present consecutive skipped steps, None if there is none. The last scheduled
            checkpoint before it is kept, because a rollback may need it.
    """
    before = [step for step in scheduled if first_skipped is None or step < first_skipped]
    kept = {*steps[-1:], *scheduled[-retention.keep_checkpoints :], *before[-1:]}
    if retention.keep_every:
        kept |= {step for step in steps if step % retention.keep_every == 0}
    others = [step for step in steps if step not in kept]
    return others[: max(0, len(steps) - retention.keep_checkpoints)]


def delete_after(directory: Path, step: int) -> None:
    """Delete the checkpoints after `step`, because a rollback trains these steps again."""
    for newer in checkpoint_steps(directory):
        if newer > step:
            _remove(directory / checkpoint_name(newer))
    atomic_write(directory / LATEST, checkpoint_name(step))


def update_state_file(checkpoint: Path, state: dict) -> None:
    """Replace keys of a checkpoint's state.json."""
    write_state(checkpoint, {**read_state(checkpoint), **state})


def remove_partial(directory: Path, step: int) -> None:
    """Remove what a killed run left half-written, and rename checkpoints after `step`, which are damaged."""
    for path in directory.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
    for newer in checkpoint_steps(directory):
        if newer > step:
            damaged = directory / (checkpoint_name(newer) + DAMAGED)
            shutil.rmtree(damaged, ignore_errors=True)
            (directory / checkpoint_name(newer)).rename(damaged)


def read_state(checkpoint: Path) -> dict:
    """Return the content of a checkpoint's state.json.

    Raises:
        ValueError: If it cannot be read or its checksum does not match.
    """
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise ValueError("has no list of files")
        if state.pop("checksum", None) != _checksum(state):
            raise ValueError("its checksum does not match")
        return {RENAMED.get(key, key): value for key, value in state.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint / STATE}: {error}") from error


def write_state(checkpoint: Path, state: dict) -> None:
    """Write state.json with its checksum."""
    atomic_write(checkpoint / STATE, json.dumps({**state, "checksum": _checksum(state)}, indent=1))


def verify_files(checkpoint: Path, files: list[str]) -> list[str]:
    """Compare files of a checkpoint with its state.json. Returns one line per problem."""
    listed = read_state(checkpoint)["files"]
    problems = []
    for name in files:
        path = checkpoint / name
        if name not in listed or not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != listed[name]["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes instead of {listed[name]['bytes']}")
        elif fsync_and_hash(checkpoint, [name])[name]["sha256"] != listed[name]["sha256"]:
            problems.append(f"{path}: its checksum does not match {STATE}")
    return problems


def _checksum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    # Rename first, so that a kill during the removal leaves no incomplete checkpoint with a final name.
    partial = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)  # on NFS a reader may hold a file; the next start removes it


def _fix(failure: str) -> str:
    full = any(os.strerror(number) in failure for number in (errno.ENOSPC, errno.EDQUOT))
    return "free some space" if full else "repair the storage"


def _earlier_checkpoints(directory: Path) -> str:
    try:
        return "the previous one is complete" if checkpoint_steps(directory) else "there is no earlier one"
    except OSError:  # the storage does not respond
        return "earlier ones were not touched"


def _free_space(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path).free / 2**30:.1f} GiB free)"
    except OSError:  # the storage does not respond
        return ""


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
