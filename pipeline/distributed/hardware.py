"""What the device can do and what of it is in use."""

import re
import resource

import torch

from pipeline.plan import GPUS


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The card's peak in FLOP/s; None where `pipeline.plan` does not know it, as for a CPU."""
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
