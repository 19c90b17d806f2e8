"""Checkpoints on disk.

    checkpoints/
        latest                    the name of the newest whole checkpoint; switched atomically, last
        step-00001000/            whole, because it has this name
            state.json            step, stream, ... every file's size and SHA-256, and its own checksum
            rank-00000.safetensors    a rank's part of weights (fp32) and optimiser state: elastic.py
            engine.json               the engine's few numbers
            weights.safetensors       the weights in fp32, for everybody else
            weights_ema.safetensors   their moving average, with train.ema_decay
    step-00003000.damaged/        put aside: it was damaged when a run continued from an earlier one
    step-00002000.partial/    being written, or left by a killed run: never read, removed at the next
        start

Invariant: a directory is given its final name only when everything in it is on the disk and listed in its
state.json. So a checkpoint with that name is whole, whenever the run was killed; and one that was damaged
later is found out before anything is read from it.
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

from safetensors import SafetensorError

from pipeline.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    raise_on_all_ranks,
    storage_error,
)
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.io.atomic import atomic_write
from pipeline.recipe.sections import TrainSection
from pipeline.train import engine
from pipeline.train.ema import ModelEma

logger = logging.getLogger(__name__)

STATE = "state.json"
SCHEDULED = "scheduled"
LATEST = "latest"
NAME = re.compile(r"step-(\d{8})")
PARTIAL = ".partial"
DAMAGED = ".damaged"


def save(
    model: engine.Engine,
    model_ema: ModelEma | None,
    directory: Path,
    step: int,
    state: dict,
    retention: TrainSection,
    dist_info: DistInfo,
) -> None:
    """Write, check and publish the checkpoint of `step`; every rank calls it. `state` goes to state.json.

    UserError on every rank where the disk of one says no; what was written is removed, the checkpoints before
    stay.
    """
    partial = directory / (checkpoint_name(step) + PARTIAL)

    def together(what: Callable[[], object]) -> list:
        """Every rank's result of what needs no other rank."""
        try:
            done, failure = what(), None
        except (OSError, SafetensorError) as error:
            done, failure = None, str(error)
        results = all_gather_object((done, failure))
        failures = [text for _, text in results if text]
        if not failures:
            return [result for result, _ in results]
        if dist_info.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise AllRanksError(
            f"{directory}: the checkpoint of step {step} cannot be written: {failures[0]}"
            f"{_free(directory.parent)}. {_before(directory)}: {_remedy(failures[0])} and start again"
        )

    alone = dist_info.rank == 0
    together(lambda: partial.mkdir(parents=True, exist_ok=True))
    together(lambda: engine.save(model, model_ema, partial))
    files = together(
        lambda: (
            engine.consolidate_fp32_weights(model, model_ema, partial) or list_files(partial)
            if alone
            else None
        )
    )[0]
    described = together(lambda: fsync_and_hash(partial, files[dist_info.rank :: dist_info.world_size]))
    listed = {name: entry for part in described for name, entry in part.items()}
    whole = {"step": step, **state, "files": listed}
    together(lambda: publish(directory, step, whole, retention) if alone else None)


def latest_valid_checkpoint(
    directory: Path, rank: int = 0, world_size: int = 1, at_most: int | None = None
) -> Path | None:
    """The newest checkpoint without a fault, None if there is none at all; every rank calls it.

    at_most: later steps are not looked at. A damaged checkpoint is passed over with a warning. UserError
    where all are damaged, or gone: training from the beginning would overwrite what could perhaps be saved.
    """
    steps, named = broadcast_object(
        raise_on_all_ranks(lambda: _list_checkpoints(directory) if rank == 0 else None)
    )

    def found(checkpoint: Path) -> list[str]:
        mine = _faults(checkpoint, lambda files: files[rank::world_size])
        return [fault for part in all_gather_object(mine) for fault in part]

    return _latest_valid(
        directory, [step for step in steps if at_most is None or step <= at_most], named, found
    )


def latest_checkpoint_with(directory: Path, file: str) -> Path | None:
    """As `newest_whole`, for who reads this one file only and asks no other rank."""
    try:
        return _latest_valid(
            directory, *_list_checkpoints(directory), lambda checkpoint: _faults(checkpoint, lambda _: [file])
        )
    except AllRanksError as error:  # with nobody
        raise UserError(str(error)) from None
    except OSError as error:
        raise storage_error(error) from None


def _list_checkpoints(directory: Path) -> tuple[list[int], bool]:
    """Steps that have a checkpoint, oldest first; and whether `latest` says that there is one."""
    return checkpoint_steps(directory), (directory / LATEST).exists()


def _latest_valid(
    directory: Path, steps: list[int], named: bool, faults_of: Callable[[Path], list[str]]
) -> Path | None:
    latest = directory / LATEST
    if named and not steps:
        raise AllRanksError(
            f"{latest}: names a checkpoint, and there is none; put it back, or remove {latest} to begin anew"
        )
    for step in reversed(steps):
        checkpoint = directory / checkpoint_name(step)
        if not (found := faults_of(checkpoint)):
            return checkpoint
        logger.info(f"warning: {checkpoint.name} is damaged ({found[0]}); trying the one before")
    if steps:
        raise AllRanksError(
            f"{directory}: every checkpoint is damaged; mend one, or remove them all to begin anew"
        )
    return None


def _faults(checkpoint: Path, share: Callable[[list[str]], list[str]]) -> list[str]:
    """`faults` of some of a checkpoint's files, or why they cannot be told."""
    try:
        return verify_files(checkpoint, share(sorted(read_state(checkpoint)["files"])))
    except (ValueError, OSError) as error:
        return [str(error)]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint of the final name, oldest first. OSError where the directory is there and
    cannot be read."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(NAME.fullmatch, names) if match)


def list_files(checkpoint: Path) -> list[str]:
    """Paths inside a checkpoint that its state.json lists, sorted."""
    paths = (p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
    return sorted(path for path in paths if path != STATE)


def fsync_and_hash(checkpoint: Path, files: list[str]) -> dict[str, dict]:
    """Force files to the disk and return {path: {"bytes", "sha256"}}."""
    described = {}
    for name in files:
        with open(checkpoint / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            described[name] = {"bytes": file.tell(), "sha256": digest}
    return described


def publish(directory: Path, step: int, state: dict, retention: TrainSection) -> Path:
    """Give the partial checkpoint of `step` its final name, switch `latest`, remove what need not be kept.

    `state` goes into state.json and must hold "files", as `describe` gives them for every file. Added is
    whether the checkpoint is one of the schedule's.
    """
    partial, final = directory / (checkpoint_name(step) + PARTIAL), directory / checkpoint_name(step)
    write_state(partial, {**state, SCHEDULED: step % retention.checkpoint_every == 0})
    _sync_directory(partial)
    if final.exists():  # a damaged one that the run went behind
        _remove(final)
    partial.rename(final)
    _sync_directory(directory)
    atomic_write(directory / LATEST, final.name)
    skipped = (state.get("guard") or {}).get("row")
    first = skipped[0] if skipped else None
    scheduled = scheduled_steps(directory, retention.checkpoint_every)
    for old in checkpoints_to_delete(checkpoint_steps(directory), scheduled, retention, first):
        _remove(directory / checkpoint_name(old))
    return final


def scheduled_steps(directory: Path, every: int) -> list[int]:
    """Steps of the checkpoints that the schedule made, whatever it was at the time, oldest first.

    every: the schedule now, by which those are judged that do not say.
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
    """Which checkpoints need not be kept, of those there are; `scheduled` are among them; all oldest first.

    first_skipped: of the steps that are being skipped in a row, None where none is. What the guard may have
    to go back to stays: a scheduled checkpoint from before. Those that signals made in between don't count,
    so that where it goes back to does not depend on interruptions; they only make up the number.
    """
    before = [step for step in scheduled if first_skipped is None or step < first_skipped]
    kept = {*steps[-1:], *scheduled[-retention.keep_checkpoints :], *before[-1:]}
    if retention.keep_every:
        kept |= {step for step in steps if step % retention.keep_every == 0}
    others = [step for step in steps if step not in kept]
    return others[: max(0, len(steps) - retention.keep_checkpoints)]


def delete_after(directory: Path, step: int) -> None:
    """Remove the checkpoints after `step`: the run goes another way from there."""
    for newer in checkpoint_steps(directory):
        if newer > step:
            _remove(directory / checkpoint_name(newer))
    atomic_write(directory / LATEST, checkpoint_name(step))


def update_state(checkpoint: Path, state: dict) -> None:
    """Replace keys of a checkpoint's state.json."""
    write_state(checkpoint, {**read_state(checkpoint), **state})


def remove_partial(directory: Path, step: int) -> None:
    """Remove what a killed run left half-written; put aside what is newer than `step`, being damaged."""
    for path in directory.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
    for newer in checkpoint_steps(directory):
        if newer > step:
            aside = directory / (checkpoint_name(newer) + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            (directory / checkpoint_name(newer)).rename(aside)


def read_state(checkpoint: Path) -> dict:
    """A checkpoint's state.json. ValueError where it cannot be read, or is not as it was written."""
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise ValueError("it lists no files")
        if state.pop("checksum", None) != _checksum(state):
            raise ValueError("its checksum is not its content's")
        return state
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint / STATE}: {error}") from None


def write_state(checkpoint: Path, state: dict) -> None:
    """Write state.json, with a checksum of its own."""
    atomic_write(checkpoint / STATE, json.dumps({**state, "checksum": _checksum(state)}, indent=1))


def verify_files(checkpoint: Path, files: list[str]) -> list[str]:
    """What is wrong with files of a checkpoint, a line each; empty where all are as state.json says."""
    listed = read_state(checkpoint)["files"]
    found = []
    for name in files:
        path = checkpoint / name
        if name not in listed or not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != listed[name]["bytes"]:
            found.append(f"{path}: {path.stat().st_size} bytes instead of {listed[name]['bytes']}")
        elif fsync_and_hash(checkpoint, [name])[name]["sha256"] != listed[name]["sha256"]:
            found.append(f"{path}: its checksum does not match {STATE}")
    return found


def _checksum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    # Renamed first, so that a kill in between leaves no half checkpoint under a final name.
    doomed = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # a reader on NFS may hold a file; the next start tries again


def _remedy(failure: str) -> str:
    full = any(os.strerror(number) in failure for number in (errno.ENOSPC, errno.EDQUOT))
    return "make room" if full else "mend the storage"


def _before(directory: Path) -> str:
    try:
        return "The one before is whole" if checkpoint_steps(directory) else "There is none before it"
    except OSError:  # the storage answers no more
        return "Those before were not touched"


def _free(place: Path) -> str:
    try:
        return f" ({shutil.disk_usage(place).free / 2**30:.1f} GiB are free)"
    except OSError:  # the storage answers no more
        return ""


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
