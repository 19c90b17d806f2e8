"""What the device can do and what of it is in use."""

import resource

import torch

PEAK_FLOPS = {  # dense bf16 and fp16 tensor-core rate, NVIDIA's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak rate in FLOP/s for bf16; None where it is not in the table, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK_FLOPS.items() if card in name), None)


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far, in GiB: on the GPU, or on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
