"""Memory that a run frees stays its own, for its next step."""

import os
import subprocess
import sys

from pipeline.distributed import host_memory

TAKEN = 400 * 2**20
TAKE_AND_FREE = """
import psutil, torch
from pipeline.distributed.launch import find_world

find_world()
before = psutil.Process().memory_info().rss
tensors = [torch.ones(5 * 2**20) for _ in range(20)]
del tensors
print(psutil.Process().memory_info().rss - before)
"""


def held_after_freeing(**environment: str) -> int:
    """Bytes of 400 MiB, taken and freed in twenty tensors, that a process still holds."""
    clean = {name: value for name, value in os.environ.items() if name not in host_memory.CHOSEN_BY_USER}
    env = {**clean, "DS_ACCELERATOR": "cpu", **environment}
    return int(subprocess.run([sys.executable, "-c", TAKE_AND_FREE], env=env, stdout=-1, check=True).stdout)


def test_a_run_keeps_what_it_frees():
    assert held_after_freeing() > 0.9 * TAKEN


def test_the_users_own_settings_stand():
    # Below it every tensor is a mapping of its own, and goes back to the kernel when it is freed.
    assert held_after_freeing(MALLOC_MMAP_THRESHOLD_=str(2**20)) < 0.1 * TAKEN
