"""Functions with faults, which test_gpu_check.py runs in the child processes of gpu-check."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time

from pipeline.gpu_check.check import Context, Finding


def double(number):
    return 2 * number


def fail():
    raise ValueError("the first line\nanother")


def crash():
    ctypes.string_at(0)


def crash_after_the_result(result):
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
    return result


def hang(path):
    """Start a process in a session of its own, write its id, and hang."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, start_new_session=True)
    with open(path + ".new", "w") as file:
        file.write(str(process.pid))
    os.rename(path + ".new", path)
    time.sleep(600)


def passing_check(context: Context) -> Finding:
    return Finding(f"on the {context.device}", "none", "passed", [{"threads": 1, "images_per_s": 2.0}])


def crashing_check(context: Context) -> Finding:
    crash()
    return passing_check(context)


def never_skip(context):
    """Train a step that should be skipped, but is not."""
    import torch

    from pipeline.gpu_check.stage_ranks import skip_on_stages

    return skip_on_stages(context, "fp32", [(1, "none")], should_skip=lambda guard, norm: torch.zeros(()))


def memory_verdict(context, gib):
    """Check the memory; its reading is `gib`."""
    from pipeline.gpu_check.memory import check_memory

    return check_memory(Context(**context), lambda: gib).verdict
