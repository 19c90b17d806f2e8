"""What the launcher set: rank, world size, device."""

import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pipeline.distributed.hardware import keep_freed_memory
from pipeline.errors import UserError

PORTS = range(20000, 32768)  # below the usual range of ephemeral ports


class DistInfo(NamedTuple):
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    num_cpus: int
    """CPU cores of this rank: what Slurm assigned to the task, else an equal share of the node's cores."""


def init_dist_env() -> DistInfo:
    """Read the launcher's environment, complete it for DeepSpeed, choose the device.

    On a CPU also the number of threads, and how memory is held.
    """
    env = os.environ
    cores = None
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _env_int("RANK"), _env_int("WORLD_SIZE")
        local_rank = _env_int("LOCAL_RANK", rank)
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = _env_int("LOCAL_WORLD_SIZE", _env_int("LOCAL_SIZE", size))
    elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun for its tasks, not by sbatch for its script
        rank, size = _env_int("SLURM_PROCID"), _env_int("SLURM_STEP_NUM_TASKS")
        local_rank = _env_int("SLURM_LOCALID")
        local_size = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0])
        if "SLURM_CPUS_PER_TASK" in env:
            cores = _env_int("SLURM_CPUS_PER_TASK")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_node_address(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(PORTS[_env_int("SLURM_JOB_ID") % len(PORTS)]))
    else:
        rank, size, local_rank, local_size = 0, 1, 0, 1
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(_free_port()))
    env.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    port = _env_int("MASTER_PORT")
    if size > local_size and "GLOO_SOCKET_IFNAME" not in env:
        interface = _interface_to(env["MASTER_ADDR"], port)
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
    dist_info = DistInfo(rank, size, local_rank, local_size, device, cores)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in env:
        torch.set_num_threads(dist_info.num_cpus)
    return dist_info


def node_name() -> str:
    """This machine, in Slurm's words where Slurm started it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _env_int(name: str, default: int | None = None) -> int:
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


def _first_node_address(nodelist: str) -> str:
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


def _interface_to(host: str, port: int) -> str | None:
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
