"""Throughput of a run, and which rank slows down the others.

Ranks wait for each other in every step, so a step takes the same time on all of them. A rank's own speed is therefore
measured on what it does without the others: waiting for its data, and its forward passes. The backward pass is left
out, because gradients are reduced during it. With ZeRO-3 the forward pass gathers weights: a slow device then slows
every rank alike, and only a rank with slow data can be identified.

Invariant: measuring never makes the host wait for the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from pipeline.distributed.collectives import all_gather_object, all_gather_scalar
from pipeline.distributed.hardware import peak_flops, peak_memory_gib, used_memory_gib
from pipeline.distributed.launch import DistInfo, node_name
from pipeline.methods.flops import training_flops
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.training import TrainingRecipe


class TimedLoader(Protocol):
    """A loader that measures how long `next` blocked."""

    @property
    def wait_s(self) -> float: ...


class ThroughputMeter:
    """Measures one rank from one logged line to the next. Every rank creates one and calls `compute`.

    Args:
        forward_flops: FLOPs of one image's forward pass; 0 if unknown.
    """

    def __init__(self, recipe: TrainingRecipe | ProbeRecipe, forward_flops: float, dist_info: DistInfo):
        self._dist_info, self._global_batch = dist_info, recipe.data.global_batch
        self._flops_per_image = training_flops(forward_flops)
        self._peak_flops = peak_flops(dist_info.device, recipe.engine.precision)
        self._hosts = all_gather_object(node_name())

    def start(self, step: int, loader: TimedLoader) -> None:
        """Start an interval after `step` completed steps."""
        self._step, self._loader, self._waited = step, loader, loader.wait_s
        self._compute_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    @contextmanager
    def time_compute(self) -> Iterator[None]:
        """Measure work that waits for no other rank."""
        if self._dist_info.device.type == "cuda":
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            started = time.perf_counter()
            yield
            self._compute_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the interval. The device must be idle."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def compute(self, step: int) -> dict[str, float | int | str | None]:
        """Return the throughput metrics of the interval (docs/running.md). Collective; the device must be idle.

        `data_wait`, `memory` and `memory_used` are this rank's.
        """
        elapsed, waited = time.perf_counter() - self._started, self._loader.wait_s - self._waited
        rate = (step - self._step) * self._global_batch / elapsed
        compute_s = self._compute_s + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        times = all_gather_scalar((waited + compute_s) / (step - self._step), self._dist_info)
        slowest = max(range(len(times)), key=times.__getitem__)
        world_size, mfu = self._dist_info.world_size, None
        if self._peak_flops and self._flops_per_image:
            mfu = self._flops_per_image * rate / (self._peak_flops * world_size)
        return {
            "images_per_s": rate,
            "images_per_s_rank": rate / world_size,
            "data_wait": waited / elapsed,
            "mfu": mfu,
            "memory": peak_memory_gib(self._dist_info.device),
            "memory_used": used_memory_gib(self._dist_info.device),
            "rank_time": sorted(times)[len(times) // 2],
            "slowest_time": times[slowest],
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
        }
