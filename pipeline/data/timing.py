"""Steady throughput of a step that works ahead in the background."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Duration of a number of steps."""

    steps: int
    seconds: float
    cpu_seconds: float
    """CPU time of this process, all threads together."""


def time_steps(
    step: Callable[[], object],
    device: torch.device,
    *,
    warmup: int,
    min_steps: int = 1,
    min_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time a step until both minima are reached.

    Args:
        warmup: Steps before the clock starts. If the step delivers what is prefetched, they must be more than the
            prefetched ones, which would otherwise count although they were made before.
    """
    for _ in range(warmup):
        step()
    _synchronize(device)
    steps, start, cpu_start = 0, clock(), time.process_time()
    while steps < min_steps or clock() - start < min_seconds:
        step()
        steps += 1
    _synchronize(device)
    return Timing(steps, clock() - start, time.process_time() - cpu_start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
