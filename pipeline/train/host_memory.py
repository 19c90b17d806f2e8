"""How a run on the CPU holds its memory.

Every training step takes and frees the same gigabytes. glibc returns much of what is freed to the kernel, and
the next step pays for each page again, by tens of thousands of page faults (docs/methods.md has figures).
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST, LARGEST_OF_OLD = 2**31 - 1, 32 * 2**20  # bytes; a glibc before 2.35 takes no more for mmap
NEVER = -1
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
    # The order counts: to set any of the two ends glibc's own adjustment of both.
    taken = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in (LARGEST, LARGEST_OF_OLD))
    return taken and mallopt(M_TRIM_THRESHOLD, NEVER) == 1
