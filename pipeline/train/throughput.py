"""How fast a run is, and which of its ranks holds up the others.

Ranks wait for each other in every step, so a whole step takes the same time on all of them and does not tell
who is slow. What is measured of a rank is therefore what it does alone: waiting for its own data, and its
forward passes. The backward pass is left out, because gradients are exchanged while it runs. At ZeRO 3 the
forward pass fetches weights from the other ranks: there a slow device slows all alike, and only a rank whose
data are slow can be told.

Invariant: measuring never makes the host wait for the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.data.loader import Loader
from pipeline.distributed.collectives import all_gather_object, all_gather_scalar
from pipeline.distributed.hardware import memory_gib, peak_flops
from pipeline.distributed.launch import DistInfo, node_name
from pipeline.methods.flops import training_flops
from pipeline.recipe.base import TrainingRecipe


class ThroughputMeter:
    """The clock of one rank, from one logged line to the next. Every rank makes one, and calls `close`."""

    def __init__(self, recipe: TrainingRecipe, forward_flops: float, dist_info: DistInfo):
        """forward_flops: an image's share of a micro batch."""
        self.dist_info, self.global_batch = dist_info, recipe.data.global_batch
        self.image_flops = training_flops(forward_flops)
        self.peak = peak_flops(dist_info.device, recipe.engine.precision)
        self.hosts = all_gather_object(node_name())

    def start(self, step: int, loader: Loader) -> None:
        """Begin to measure: `step` steps are done."""
        self._step, self._loader, self._waited = step, loader, loader.waited
        self._alone = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = time.perf_counter()

    @contextmanager
    def time_compute(self) -> Iterator[None]:
        """Around work that waits for no other rank."""
        if self.dist_info.device.type == "cuda":
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._alone += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: the rate is the rate of training. The device must be idle."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def close(self, step: int) -> dict[str, float | int | str | None]:
        """Speed since `start`, now that `step` steps are done and the device is idle: docs/running.md has the
        names and units. Every rank must call it; data_wait and memory are this rank's."""
        took, waited = time.perf_counter() - self._began, self._loader.waited - self._waited
        rate = (step - self._step) * self.global_batch / took
        time_compute = self._alone + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        times = all_gather_scalar((waited + time_compute) / (step - self._step), self.dist_info)
        slowest = max(range(len(times)), key=times.__getitem__)
        return {
            "images_per_s": rate,
            "images_per_s_rank": rate / self.dist_info.world_size,
            "data_wait": waited / took,
            "mfu": self.image_flops * rate / (self.peak * self.dist_info.world_size) if self.peak else None,
            "memory": memory_gib(self.dist_info.device),
            "rank_time": sorted(times)[len(times) // 2],
            "slowest_time": times[slowest],
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
        }
