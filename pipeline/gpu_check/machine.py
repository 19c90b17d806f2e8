"""What machine this is, found out in a process of its own, so that the command itself holds no GPU memory."""

import os
from typing import Any

import torch

from pipeline.train.run_directory import package_versions


def describe() -> dict[str, Any]:
    """Return the GPUs that torch can use, the cores, and the versions that may matter."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "gpus": [gpu.name for gpu in properties],
        "memory_gib": [round(gpu.total_memory / 2**30, 1) for gpu in properties],
        "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if count else None,
        "versions": package_versions(),
    }
