"""Who am I among the ranks, and what do the others say: the one place that reads what a launcher sets.

Understood are DeepSpeed's launcher and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_*) and no
launcher at all. Invariant: after `find_world` the environment says the same thing in the words that DeepSpeed
reads.
"""

import errno
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch
import torch.distributed as dist

from pipeline.errors import AgreedError, Diverged, StoppedEarly, UserError
from pipeline.train.host_memory import keep_freed_memory

T = TypeVar("T")
PORTS = range(20000, 32768)  # below the usual range of ephemeral ports


class World(NamedTuple):
    """This process among all: `rank` of `size`, and on its node `local_rank` of `local_size`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    cores: int
    """This rank's share of the node's cores: srun's word where it has one, else an even share."""


def find_world() -> World:
    """Read the launcher's environment, complete it for DeepSpeed, choose the device.

    On a CPU also the number of threads, and how memory is held.
    """
    env = os.environ
    cores = None
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", rank)
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", size))
    elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun for its tasks, not by sbatch for its script
        rank, size = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
        local_rank = _number("SLURM_LOCALID")
        local_size = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0])
        if "SLURM_CPUS_PER_TASK" in env:
            cores = _number("SLURM_CPUS_PER_TASK")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _address_of_first(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(PORTS[_number("SLURM_JOB_ID") % len(PORTS)]))
    else:
        rank, size, local_rank, local_size = 0, 1, 0, 1
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(_free_port()))
    env.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    port = _number("MASTER_PORT")
    if size > local_size and "GLOO_SOCKET_IFNAME" not in env:
        interface = _interface_towards(env["MASTER_ADDR"], port)
        if interface:  # Gloo would take the one that the host's name stands for, often the loopback
            env["GLOO_SOCKET_IFNAME"] = interface

    if env.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", _device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        env["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the device's number
    else:
        if Path("/proc/driver/nvidia/version").exists() and "DS_ACCELERATOR" not in env:
            raise UserError(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} finds no GPU it can use; "
                "install a torch for the driver's CUDA version, or set DS_ACCELERATOR=cpu to train without"
            )
        device = torch.device("cpu")
        env["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    cores = cores or max(1, len(os.sched_getaffinity(0)) // local_size)
    world = World(rank, size, local_rank, local_size, device, cores)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in env:
        torch.set_num_threads(world.cores)
    return world


@contextmanager
def joined(timeout_minutes: float) -> Iterator[World]:
    """Connected with the other ranks, without DeepSpeed: for what trains no large model."""
    world = find_world()
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10 + 2 * timeout_minutes))
    with leaving_together():
        yield world


@contextmanager
def leaving_together() -> Iterator[None]:
    """Takes the ranks apart again where the block ends on all of them: at its end, or by what all raise.

    Left to the end of the process, a connection whose other side has gone can abort it, and with it the exit
    code is lost. Where one rank alone fails, nobody waits for the others.
    """
    try:
        yield
    except (AgreedError, StoppedEarly, Diverged):
        leave()
        raise
    leave()


def leave() -> None:
    """Take the connection to the other ranks apart, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def node_name() -> str:
    """This machine, in Slurm's words where Slurm started it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def say(text: str) -> None:
    """A sentence for whoever watches, from rank 0, on stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def all_ranks_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, element by element, in place."""
    if not dist.is_initialized():
        return values
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def all_ranks(value: float, world: World) -> list[float]:
    """Every rank's number, in the order of ranks, on every rank."""
    own = torch.tensor([value], dtype=torch.float64, device=world.device)
    if not dist.is_initialized():
        return own.tolist()
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(everyone, own)
    return torch.cat(everyone).tolist()


def from_rank_0(value: object) -> object:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: object) -> list[object]:
    """Every rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def gathered_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every rank, (n, ...), in the order of ranks, on every rank; n may differ."""
    if not dist.is_initialized():
        return rows
    counts = gathered(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def agreed(what: Callable[[], T]) -> T:
    """This rank's result of what needs no other rank. AgreedError on all where one raises UserError, or its
    storage an OSError; StoppedEarly on all where one raises that."""
    done, fault, early = None, None, None
    try:
        done = what()
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = str(of_storage(error))
    except StoppedEarly as stop:
        early = str(stop)
    faults, stops = (
        list(dict.fromkeys(filter(None, texts))) for texts in zip(*gathered((fault, early)), strict=True)
    )
    if faults:
        raise AgreedError("; ".join(faults))
    if stops:
        raise StoppedEarly(stops[0])
    return done


def equally_many(batches: Iterable[T]) -> Iterator[T | None]:
    """This rank's batches, then None as long as another rank has one: for what all ranks do together, as
    ZeRO-3 computes. Every rank calls it. AgreedError on all where one cannot get its next."""
    own = iter(batches)
    while True:
        batch = agreed(lambda: next(own, None))
        if not any(gathered(batch is not None)):
            return
        yield batch


def of_storage(error: OSError) -> UserError:
    """What a user can do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(
        f"{error}; {'make room' if full else 'mend the storage'}, and start the same command again"
    )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UserError(
            f"environment variable {name}: expected a number, found {text!r}; the launcher sets it: "
            "start with deepspeed, torchrun, srun, or none of them"
        ) from None


def _device_index(local_rank: int, devices: int) -> int:
    if local_rank < devices:
        return local_rank
    if devices == 1:  # each task sees its own GPU, and nothing else
        return 0
    raise UserError(f"local rank {local_rank} finds {devices} GPUs: start at most one rank a GPU")


def _address_of_first(nodelist: str) -> str:
    """The address by which Slurm itself reaches the first of the nodes."""
    try:
        first = _scontrol("show", "hostnames", nodelist).split()[0]
        words = _scontrol("--oneliner", "show", "node", first).split()
        return next(word for word in words if word.startswith("NodeAddr=")).removeprefix("NodeAddr=")
    except (OSError, subprocess.CalledProcessError, IndexError, StopIteration) as error:
        raise UserError(
            f"cannot ask scontrol for the address of the first node of {nodelist!r} ({error}); set "
            "MASTER_ADDR to it"
        ) from None


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout


def _interface_towards(host: str, port: int) -> str | None:
    """The network interface by which this machine reaches `host`; None where that is unclear."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
