"""How a run on the CPU holds its memory.

Every training step takes and frees the same gigabytes. glibc returns much of what is freed to the kernel, and
the next step pays for each page again, by tens of thousands of page faults (docs/methods.md has figures).
"""

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST = 2**31 - 1
CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


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
    return all([mallopt(threshold, LARGEST) == 1 for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)])
