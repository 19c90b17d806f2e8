"""A process that trains on a CPU keeps the memory that it frees, for its next step."""

import os
import subprocess
import sys

from pipeline.distributed.hardware import MALLOC_VARIABLES

ALLOCATED = 400 * 2**20
ALLOCATE_AND_FREE = """
import psutil, torch
from pipeline.distributed.launch import init_dist_env

init_dist_env()
before = psutil.Process().memory_info().rss
tensors = [torch.ones(5 * 2**20) for _ in range(20)]
del tensors
print(psutil.Process().memory_info().rss - before)
"""


def kept_bytes(**environment: str) -> int:
    """Return how much of 400 MiB, allocated and freed as twenty tensors, a process keeps."""
    inherited = {name: value for name, value in os.environ.items() if name not in MALLOC_VARIABLES}
    env = {**inherited, "DS_ACCELERATOR": "cpu", **environment}
    command = [sys.executable, "-c", ALLOCATE_AND_FREE]
    return int(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def test_freed_memory_is_kept():
    assert kept_bytes() > 0.9 * ALLOCATED


def test_malloc_settings_of_the_environment_are_kept():
    # Every tensor is above the threshold, so it has its own mapping, which the kernel gets back.
    assert kept_bytes(MALLOC_MMAP_THRESHOLD_=str(2**20)) < 0.1 * ALLOCATED
