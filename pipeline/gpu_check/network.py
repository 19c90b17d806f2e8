"""Check 15: bandwidth between the GPUs, the ranks' stop requests, and the placement of ranks on cores."""

import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import all_gather_object, destroy_process_group
from pipeline.distributed.launch import init_dist_env
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.gpu_check.child import call
from pipeline.train import engine

TIMEOUT_S = 300.0
ROUNDS = 20
NODES = Path("/sys/devices/system/node")


def check_network(context: Context) -> Finding:
    """Measure on all ranks of this machine."""
    ranks = call(
        "pipeline.gpu_check.network:measure_rank",
        {"all_reduce_bytes": 256 * 2**20 if context.on_gpu else 4 * 2**20},
        device=context.device,
        timeout_s=TIMEOUT_S,
        ranks=context.gpus,
    )
    return judge_ranks(ranks)


def judge_ranks(ranks: list[dict[str, Any]]) -> Finding:
    """Judge the sums of the collectives; name ranks whose placement slows them down."""
    first, world_size = ranks[0], len(ranks)
    value = "one rank, no network to measure"
    if world_size > 1:
        value = f"{world_size} ranks: {first['backend']} all_reduce {first['gb_per_s']:.1f} GB/s per rank, "
        value += f"Gloo round trip {first['gloo_us']:.0f} us"
    value += f"; {first['cores']} cores and {first['torch_threads']} torch threads per rank"
    remote = [
        rank["rank"] for rank in ranks if rank["gpu_node"] is not None and rank["gpu_node"] not in rank["cpu_nodes"]
    ]
    if remote:
        value += f"; warning: ranks {remote} have no core on their GPU's NUMA node"
    if first["torch_threads"] > max(1, first["cores"]):
        value += "; warning: more torch threads than cores; set OMP_NUM_THREADS"
    verdict = judge(all(rank["correct"] for rank in ranks)) if world_size > 1 else "measured"
    return Finding(value, "correct sums on every rank", verdict, ranks)


def measure_rank(all_reduce_bytes: int) -> list[dict[str, Any]]:
    """Measure this rank. Returns the rows of all ranks."""
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    rank, world_size, device = dist_info.rank, dist_info.world_size, dist_info.device
    row: dict[str, Any] = {
        "rank": rank,
        "backend": dist.get_backend(),
        "cores": dist_info.num_cpus,
        "torch_threads": torch.get_num_threads(),
    }
    numbers = torch.empty(all_reduce_bytes // 4, device=device)
    expected = world_size * (world_size + 1) / 2
    seconds, correct = [], True
    for _ in range(ROUNDS):
        numbers.fill_(rank + 1)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        correct = correct and bool((numbers == expected).all())
    sent = 2 * (world_size - 1) / world_size * all_reduce_bytes
    row |= {"correct": correct, "gb_per_s": sent / statistics.median(seconds) / 1e9, "gloo_us": _time_gloo()}
    cpus = os.sched_getaffinity(0)
    row["cpu_nodes"] = [node for node, cores in _numa_nodes().items() if cores & cpus]
    row["gpu_node"] = _gpu_numa_node(device) if device.type == "cuda" else None
    rows = all_gather_object(row)
    destroy_process_group()
    return rows


def _time_gloo() -> float:
    """Return the median microseconds of an all_reduce of one number on the CPU."""
    group: Any = dist.new_group(backend="gloo")
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(torch.zeros(1), group=group)
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _numa_nodes() -> dict[int, set[int]]:
    """Return the cores of each NUMA node."""
    nodes = {}
    for path in NODES.glob("node[0-9]*/cpulist"):
        cores: set[int] = set()
        for part in filter(None, path.read_text().strip().split(",")):
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
        nodes[int(path.parent.name.removeprefix("node"))] = cores
    return nodes


def _gpu_numa_node(device: torch.device) -> int | None:
    """Return the NUMA node of a GPU; None if nvidia-smi or the kernel does not say."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        bus_id = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        # nvidia-smi has eight digits of the domain, sysfs four.
        node = int(Path("/sys/bus/pci/devices", bus_id.lower()[-12:], "numa_node").read_text())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return node if node >= 0 else None
