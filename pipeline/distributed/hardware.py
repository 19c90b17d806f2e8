"""Devices: peak throughput, memory, numerical settings, and malloc settings for training on a CPU."""

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
    """Figures of a GPU as NVIDIA states them, and of the network of a node with it.

    Not all were compared with a data sheet; check those of your card before you rely on an estimate.
    """

    bits16: float
    """Peak dense TFLOP/s of 16-bit matrix products; data sheets list twice as much, for sparse matrices."""
    bits32: float
    """Peak TFLOP/s in fp32, without TF32."""
    memory_gb: float
    name: str
    """Regular expression for torch's device name, in lower case and with spaces instead of hyphens."""
    bf16: bool = True
    link_gbit: float = 400
    """Gbit/s of all network adapters of a node. From the data sheet of NVIDIA's system of eight GPUs: DGX-1 has
    4 x 100, DGX A100 8 x 200, DGX H100, H200 and B200 8 x 400, DGX B300 8 x 800. For other cards, which no such
    system has, 400 is an assumption."""


GPUS = {
    "v100": Gpu(125, 15.7, 32, r"v100 sxm\d", bf16=False),
    "a100-40": Gpu(312, 19.5, 40, r"a100 .*40gb", link_gbit=1600),
    "a100": Gpu(312, 19.5, 80, r"a100|a800", link_gbit=1600),
    "l40s": Gpu(362, 91.6, 48, r"l40s"),
    "rtx6000ada": Gpu(364, 91.1, 48, r"rtx 6000 ada"),
    "rtx4090": Gpu(165, 82.6, 24, r"rtx 4090$"),
    "h100-pcie": Gpu(756, 51, 80, r"h[18]00 pcie"),
    "h100-nvl": Gpu(835, 60, 94, r"h100 nvl"),
    "h200-nvl": Gpu(835, 60, 141, r"h200 nvl"),
    "h100": Gpu(989, 67, 80, r"h[18]00", link_gbit=3200),
    "gh200": Gpu(989, 67, 96, r"gh200"),
    "h200": Gpu(989, 67, 141, r"h200", link_gbit=3200),
    "h20": Gpu(148, 44, 96, r"h20", link_gbit=3200),
    "gb200": Gpu(2500, 80, 186, r"gb200", link_gbit=1600),
    "b200": Gpu(2250, 75, 180, r"b200", link_gbit=3200),
    "b300": Gpu(2250, 75, 270, r"b300", link_gbit=6400),
}
"""By the name that --gpu takes. A device is the first one whose `name` it has: variants come before their base.

The A800 and the H800 are A100 and H100 with slower NVLink. A GB200 node has four GPUs and 4 x 400 Gbit/s.
"""


def find_gpu(device_name: str) -> Gpu | None:
    """Return the figures of a GPU by torch's device name; None for a MIG instance or an unknown GPU."""
    name = device_name.lower().replace("-", " ")
    if re.search(r"\bmig\b", name):
        return None
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b(?:{gpu.name})(?![a-z0-9])", name)), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak in FLOP/s, None for a CPU and for GPUs that `GPUS` does not list."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu and 1e12 * (gpu.bits32 if precision == "fp32" else gpu.bits16)


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: of the GPU, or of the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def used_memory_gib(device: torch.device) -> float | None:
    """Return the GPU's memory in use in GiB, all processes and libraries included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def total_memory_gib(device: torch.device) -> float | None:
    """Return the GPU's memory in GiB, None for a CPU."""
    return torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else None


def disable_tf32() -> None:
    """Compute fp32 convolutions and matrix products in fp32; by default cuDNN rounds their inputs to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def enable_determinism() -> None:
    """Make torch select deterministic algorithms, and raise RuntimeError if there is none.

    Of the fused attention kernels, only flash attention has a deterministic backward pass; if it does not support
    the inputs (fp32, attention masks), torch computes attention by matrix products.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by the first matrix product on a GPU
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # for debugging, and slow
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


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
