"""What the device can do and what of it is in use."""

import ctypes
import os
import re
import resource
from dataclasses import dataclass

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


LARGEST, LARGEST_OF_OLD = 2**31 - 1, 32 * 2**20  # bytes; a glibc before 2.35 takes no more for mmap


NEVER = -1


CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class Gpu:
    """Peak dense TFLOP/s of matrix products in 16 and 32 bits, and memory, by NVIDIA's data sheets."""

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
    """The card's peak in FLOP/s; None where `pipeline.estimate.plan` does not know it, as for a CPU."""
    if device.type != "cuda":
        return None
    words = re.split(r"[ -]", torch.cuda.get_device_name(device).lower())
    if {"pcie", "nvl", "mig"} & set(words):  # slower than the cards in the table
        return None
    for card, figures in GPUS.items():
        if card.split("-")[0] in (*words, "".join(words[-2:])):
            return 1e12 * (figures.bits32 if precision == "fp32" else figures.bits16)
    return None


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far, in GiB: on the GPU, or on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocations. -> whether it does.

    Nothing is changed where the environment says already how malloc shall behave (mallopt(3)), or where the C
    library is not glibc.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The order counts: to set any of the two ends glibc's own adjustment of both.
    taken = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in (LARGEST, LARGEST_OF_OLD))
    return taken and mallopt(M_TRIM_THRESHOLD, NEVER) == 1
