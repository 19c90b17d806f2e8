"""Devices: their peak throughput and memory, and malloc settings for training on a CPU."""

import ctypes
import os
import re
import resource
from dataclasses import dataclass

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLDS = (2**31 - 1, 32 * 2**20)
"""Bytes, in order of preference: glibc before 2.35 accepts at most 32 MiB."""
TRIM_NEVER = -1
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class Gpu:
    """Peak dense TFLOP/s of matrix products in 16 and 32 bits, and memory, from NVIDIA's data sheets."""

    bits16: float
    bits32: float
    memory_gb: float
    bf16: bool = True


GPUS = {
    "v100": Gpu(125, 15.7, 32, bf16=False),
    "a100-40": Gpu(312, 19.5, 40),
    "a100": Gpu(312, 19.5, 80),
    "l40s": Gpu(362, 91.6, 48),
    "rtx4090": Gpu(165, 82.6, 24),
    "h100": Gpu(989, 67, 80),
    "h200": Gpu(989, 67, 141),
    "b200": Gpu(2250, 80, 180),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak in FLOP/s, None for a CPU and for GPUs that `GPUS` does not list."""
    if device.type != "cuda":
        return None
    words = re.split(r"[ -]", torch.cuda.get_device_name(device).lower())
    if {"pcie", "nvl", "mig"} & set(words):  # slower than the listed variants
        return None
    for name, gpu in GPUS.items():
        if name.split("-")[0] in (*words, "".join(words[-2:])):
            return 1e12 * (gpu.bits32 if precision == "fp32" else gpu.bits16)
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: of the GPU, or of the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory for later allocations of this process.

    Every training step allocates and frees the same gigabytes. By default glibc returns much of it to the kernel,
    and the next step pays for tens of thousands of page faults (docs/benchmarks.md). Does nothing if the
    environment configures malloc (mallopt(3)) or the C library is not glibc.

    Returns:
        Whether malloc accepted the settings.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Both are set, in this order: setting either disables glibc's automatic adjustment of both.
    accepted = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in MMAP_THRESHOLDS)
    return accepted and mallopt(M_TRIM_THRESHOLD, TRIM_NEVER) == 1
