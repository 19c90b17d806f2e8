"""Who am I among the ranks, and what do the others say: the one place that reads what a launcher sets.

Understood are DeepSpeed's launcher and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_*) and no
launcher at all. Invariant: after `find_world` the environment says the same thing in the words that DeepSpeed
reads.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.errors import AllRanksError, Diverged, StoppedEarly, UserError

T = TypeVar("T")


@contextmanager
def init_distributed(timeout_minutes: float) -> Iterator[DistInfo]:
    """Connected with the other ranks, without DeepSpeed: for what trains no large model."""
    dist_info = init_dist_env()
    backend = "nccl" if dist_info.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10 + 2 * timeout_minutes))
    with destroy_process_group_on_exit():
        yield dist_info


@contextmanager
def destroy_process_group_on_exit() -> Iterator[None]:
    """Takes the ranks apart again where the block ends on all of them: at its end, or by what all raise.

    Left to the end of the process, a connection whose other side has gone can abort it, and with it the exit
    code is lost. Where one rank alone fails, nobody waits for the others.
    """
    try:
        yield
    except (AllRanksError, StoppedEarly, Diverged):
        destroy_process_group()
        raise
    destroy_process_group()


def destroy_process_group() -> None:
    """Take the connection to the other ranks apart, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, element by element, in place."""
    if not dist.is_initialized():
        return values
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def all_gather_scalar(value: float, dist_info: DistInfo) -> list[float]:
    """Every rank's number, in the order of ranks, on every rank."""
    own = torch.tensor([value], dtype=torch.float64, device=dist_info.device)
    if not dist.is_initialized():
        return own.tolist()
    everyone = [torch.empty_like(own) for _ in range(dist_info.world_size)]
    dist.all_gather(everyone, own)
    return torch.cat(everyone).tolist()


def broadcast_object(value: object) -> object:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather_object(value: object) -> list[object]:
    """Every rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def all_gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every rank, (n, ...), in the order of ranks, on every rank; n may differ."""
    if not dist.is_initialized():
        return rows
    counts = all_gather_object(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def raise_on_all_ranks(what: Callable[[], T]) -> T:
    """This rank's result of what needs no other rank. AgreedError on all where one raises UserError, or its
    storage an OSError; StoppedEarly on all where one raises that."""
    done, fault, early = None, None, None
    try:
        done = what()
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = str(storage_error(error))
    except StoppedEarly as stop:
        early = str(stop)
    faults, stops = (
        list(dict.fromkeys(filter(None, texts)))
        for texts in zip(*all_gather_object((fault, early)), strict=True)
    )
    if faults:
        raise AllRanksError("; ".join(faults))
    if stops:
        raise StoppedEarly(stops[0])
    return done


def iterate_in_lockstep(batches: Iterable[T]) -> Iterator[T | None]:
    """This rank's batches, then None as long as another rank has one: for what all ranks do together, as
    ZeRO-3 computes. Every rank calls it. AgreedError on all where one cannot get its next."""
    own = iter(batches)
    while True:
        batch = raise_on_all_ranks(lambda: next(own, None))
        if not any(all_gather_object(batch is not None)):
            return
        yield batch


def storage_error(error: OSError) -> UserError:
    """What a user can do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(
        f"{error}; {'make room' if full else 'mend the storage'}, and start the same command again"
    )
