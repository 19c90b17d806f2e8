"""Collectives, and errors that every rank raises together.

Without a process group each collective returns this process's value, as on one rank.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.distributed.launch import DistInfo, init_dist_env, wait_for_rank_0
from pipeline.errors import AllRanksError, Diverged, StoppedEarly, UserError

T = TypeVar("T")
PIECE_BYTES = 64 * 2**20
"""Bytes of each rank that `all_gather_uneven` sends at a time."""


@contextmanager
def init_distributed(timeout_minutes: float) -> Iterator[DistInfo]:
    """Connect the ranks without DeepSpeed, for commands that train no large model.

    Args:
        timeout_minutes: Time that ranks wait for each other in training; collectives wait longer.
    """
    dist_info = init_dist_env()
    with destroy_process_group_on_exit():
        wait_for_rank_0(dist_info.rank, 60 * timeout_minutes)
        init_process_group(dist_info, timeout_minutes)
        yield dist_info


def init_process_group(dist_info: DistInfo, timeout_minutes: float) -> None:
    """Connect the ranks by NCCL on GPUs and by Gloo on CPUs."""
    backend = "nccl" if dist_info.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10 + 2 * timeout_minutes))


@contextmanager
def destroy_process_group_on_exit() -> Iterator[None]:
    """Destroy the process group if the block ends on every rank: normally, or by an error that all ranks raise.

    A group that is left to the end of the process can abort it and lose its exit code. If only this rank fails,
    the group is left alone, because destroying it would wait for the others.
    """
    try:
        yield
    except (AllRanksError, StoppedEarly, Diverged):
        destroy_process_group()
        raise
    destroy_process_group()


def destroy_process_group() -> None:
    """Destroy the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the ranks, elementwise and in place."""
    if not dist.is_initialized():
        return values
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def all_gather_scalar(value: float, dist_info: DistInfo) -> list[float]:
    """Return every rank's number, in rank order."""
    local = torch.tensor([value], dtype=torch.float64, device=dist_info.device)
    if not dist.is_initialized():
        return local.tolist()
    outputs = [torch.empty_like(local) for _ in range(dist_info.world_size)]
    dist.all_gather(outputs, local)
    return torch.cat(outputs).tolist()


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    outputs: list = [None] * dist.get_world_size()
    dist.all_gather_object(outputs, value)
    return outputs


def gather_object(value: T) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    outputs: list | None = None if dist.get_rank() else [None] * dist.get_world_size()
    dist.gather_object(value, outputs)
    return outputs


def all_gather_uneven(rows: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Concatenate the rows (n, ...) of every rank, in rank order; n may differ between ranks.

    Args:
        rows: This rank's rows.
        device: Device of the process group's backend, if the rows are elsewhere. They pass through it in pieces, of
            which it holds one per rank at a time.

    Returns:
        All rows, on the device of `rows`; on one rank `rows` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = all_gather_object(len(rows))
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
    row_bytes = gathered[:1].nbytes
    piece_rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for first in range(0, max(counts), piece_rows):
        length = min(piece_rows, max(counts) - first)
        local = rows[first : first + length]
        piece = torch.zeros(length, *rows.shape[1:], dtype=rows.dtype, device=device or rows.device)
        piece[: len(local)] = local
        parts = [torch.empty_like(piece) for _ in counts]
        dist.all_gather(parts, piece)
        for start, count, part in zip(starts, counts, parts, strict=True):
            valid = max(0, min(length, count - first))
            gathered[start + first : start + first + valid] = part[:valid]
    return gathered


def raise_on_all_ranks(function: Callable[[], T]) -> T:
    """Run a function on this rank; if it raises on any rank, raise on all of them. Collective.

    Args:
        function: May not call collectives.

    Returns:
        This rank's result.

    Raises:
        AllRanksError: If a rank raised UserError or OSError, with the messages of all ranks.
        StoppedEarly: If a rank raised it.
    """
    result, failure, cause = None, None, None
    try:
        result = function()
    except (UserError, StoppedEarly) as error:
        failure, cause = (str(error), isinstance(error, StoppedEarly)), error
    except OSError as error:
        failure, cause = (str(os_error_to_user_error(error)), False), error
    failures = list(dict.fromkeys(filter(None, all_gather_object(failure))))
    if errors := [text for text, stopped in failures if not stopped]:
        raise AllRanksError("; ".join(errors)) from cause
    if failures:
        raise StoppedEarly(failures[0][0]) from cause
    return result  # pyright: ignore[reportReturnType] (function returned it: nothing was raised)


def iterate_in_lockstep(batches: Iterable[T]) -> Iterator[T | None]:
    """Yield this rank's batches, then None until every rank has finished. Collective.

    For models whose forward pass is collective, as with ZeRO-3.

    Raises:
        AllRanksError: If a rank's iterator fails.
    """
    iterator = iter(batches)
    while True:
        batch = raise_on_all_ranks(lambda: next(iterator, None))
        if not any(all_gather_object(batch is not None)):
            return
        yield batch


def os_error_to_user_error(error: OSError) -> UserError:
    """Turn an OSError of a read or write into a UserError with the fix."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(f"{error}; {'free some space' if full else 'repair the storage'} and run the same command again")
