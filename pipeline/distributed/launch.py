"""The launcher's environment: rank, world size and device of this process.

The only module that reads launcher variables. Supported are DeepSpeed's launcher and torchrun (RANK, WORLD_SIZE,
LOCAL_RANK), srun (SLURM_*), and no launcher, in which case a MASTER_ADDR is ignored. Afterwards the environment has the
variables that DeepSpeed reads.
"""

import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pipeline.distributed.hardware import disable_tf32, keep_freed_memory
from pipeline.errors import StoppedEarly, UserError

logger = logging.getLogger(__name__)
SELF_CONNECT_S, CONNECT_ATTEMPT_S = 60.0, 5.0
PORTS = range(20000, 32768)
"""Rendezvous ports of Slurm jobs, below the usual range of ephemeral ports."""


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
    """Read the launcher's environment, complete it for DeepSpeed, and select the device.

    Also limits torch's CPU threads to this rank's share of the cores, unless OMP_NUM_THREADS is set; turns TF32 off on
    a GPU, and makes malloc keep freed memory on a CPU.

    Raises:
        UserError: If a launcher variable is invalid, or the node has a GPU that torch cannot use.
    """
    env = os.environ
    num_cpus = None
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = _env_int("RANK"), _env_int("WORLD_SIZE")
        local_rank = _env_int("LOCAL_RANK", rank)
        # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
        local_world_size = _env_int("LOCAL_WORLD_SIZE", _env_int("LOCAL_SIZE", world_size))
    elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun for its tasks, not by sbatch for its script
        rank, world_size = _env_int("SLURM_PROCID"), _env_int("SLURM_STEP_NUM_TASKS")
        local_rank = _env_int("SLURM_LOCALID")
        local_world_size = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0])
        if "SLURM_CPUS_PER_TASK" in env:
            num_cpus = _env_int("SLURM_CPUS_PER_TASK")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_node_address(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(PORTS[_env_int("SLURM_JOB_ID") % len(PORTS)]))
    else:
        rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(_free_port())  # others may be left over
    env.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    port = _env_int("MASTER_PORT")
    if world_size > local_world_size and "GLOO_SOCKET_IFNAME" not in env:
        interface = _interface_to(env["MASTER_ADDR"], port)
        if interface:  # Gloo would choose the interface of the host name, often the loopback
            env["GLOO_SOCKET_IFNAME"] = interface

    if env.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", _device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        env["LOCAL_RANK"] = str(device.index)  # DeepSpeed uses it as the device index
        disable_tf32()
    else:
        accelerator = env.get("DS_ACCELERATOR")
        if accelerator == "cuda" or (accelerator is None and Path("/proc/driver/nvidia/version").exists()):
            has = "DS_ACCELERATOR is cuda" if accelerator else "this machine has an NVIDIA driver"
            raise UserError(
                f"{has}, but torch {torch.__version__} finds no usable GPU; install a torch for the driver's CUDA "
                "version, or set DS_ACCELERATOR=cpu"
            )
        device = torch.device("cpu")
        env["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    num_cpus = num_cpus or max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if "OMP_NUM_THREADS" not in env:  # else every rank of a node would use all of its cores
        torch.set_num_threads(num_cpus)
    return DistInfo(rank, world_size, local_rank, local_world_size, device, num_cpus)


def wait_for_rank_0(rank: int, timeout_s: float, check_stop: Callable[[], None] = lambda: None) -> None:
    """Wait until the rendezvous address can be reached: torch would try for its own timeout, ignoring signals.

    Args:
        rank: This rank. Rank 0 checks whether the address is its own.
        timeout_s: Time that the other ranks wait for rank 0 to start.
        check_stop: Called several times per second; it may raise.

    Raises:
        UserError: If the address is not rank 0's.
        StoppedEarly: If rank 0 cannot be reached.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), _env_int("MASTER_PORT")
    deadline = time.monotonic() + (timeout_s if rank else min(timeout_s, SELF_CONNECT_S))
    with _listener(port) if rank == 0 else nullcontext():
        while True:
            check_stop()
            try:
                socket.create_connection((address, port), timeout=CONNECT_ATTEMPT_S).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
            if rank == 0:
                raise UserError(
                    f"MASTER_ADDR {address}: rank 0 cannot reach itself there ({reason}); set this machine's address, "
                    "or start by a launcher"
                )
            message = f"rendezvous failed: rank 0 cannot be reached at {address}:{port} ({reason})"
            logger.error(f"{message}; check MASTER_ADDR and MASTER_PORT, and that rank 0 runs")
            raise StoppedEarly(message)  # printed by rank 0 alone


def node_name() -> str:
    """Return this node's name: Slurm's, or the host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _env_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise UserError(
            f"environment variable {name}: expected a number, found {text!r}; the launcher sets it: "
            "start with deepspeed, torchrun, srun, or without a launcher"
        ) from error


def _device_index(local_rank: int, num_devices: int) -> int:
    if local_rank < num_devices:
        return local_rank
    if num_devices == 1:  # the launcher shows each rank only its own GPU
        return 0
    raise UserError(f"local rank {local_rank}: this node has {num_devices} GPUs; start at most one rank per GPU")


def _first_node_address(nodelist: str) -> str:
    """Return the address that Slurm has for the first node."""
    try:
        first = _scontrol("show", "hostnames", nodelist).split()[0]
        fields = _scontrol("--oneliner", "show", "node", first).split()
        return next(field for field in fields if field.startswith("NodeAddr=")).removeprefix("NodeAddr=")
    except (OSError, subprocess.CalledProcessError, IndexError, StopIteration) as error:
        raise UserError(
            f"MASTER_ADDR: scontrol has no address for the first node of {nodelist!r} ({error}); set it yourself"
        ) from error


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout


def _interface_to(host: str, port: int) -> str | None:
    """Return the network interface that reaches `host`, None if it cannot be found."""
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


def _listener(port: int) -> AbstractContextManager:
    """Accept connections at a port; if it is taken, as by torchrun, whoever has it does."""
    ipv6 = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6)
    except OSError:
        return nullcontext()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
