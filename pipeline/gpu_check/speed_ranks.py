"""The rank processes of check 10: throughput of engine steps, by micro batch and by ZeRO stage."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.hardware import peak_flops
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.estimate.engine_step import EngineStep
from pipeline.gpu_check.check import Context
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import Recipe
from pipeline.train import engine

LAUNCH_CALLS = ("cudaLaunchKernel", "cuLaunchKernel")
WAIT_CALLS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""Calls of the CUDA runtime in torch's profile that launch kernels, and by which a step blocks the host."""


def measure_micro_batches(
    context: dict[str, Any], recipe_name: str, micro_batches: list[int], steps: int
) -> list[dict[str, Any]]:
    """Measure a recipe's engine on one rank with increasing micro batches, until the memory is full."""
    scope, dist_info = Context(**context), init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    recipe = _recipe(scope, recipe_name, micro_batches[0], 1)
    step = EngineStep(recipe, dist_info)
    rows = []
    for batch in micro_batches:
        try:
            seconds = step.measure(batch, steps)
        except torch.OutOfMemoryError:
            break
        rows.append({**_row(recipe_name, recipe, batch, batch / seconds, dist_info), **count_host_calls(step, batch)})
    destroy_process_group()
    return rows


def measure_stages(
    context: dict[str, Any], recipe_name: str, micro_batch: int, stages: list[int], steps: int
) -> list[dict[str, Any]]:
    """Measure a recipe's engine on all ranks with each ZeRO stage."""
    scope, dist_info = Context(**context), init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    rows = []
    for stage in stages:
        recipe = _recipe(scope, recipe_name, micro_batch, dist_info.world_size, f"engine.zero_stage={stage}")
        step = EngineStep(recipe, dist_info)
        seconds = step.measure(micro_batch, steps)
        step.close()
        rate = micro_batch * dist_info.world_size / seconds
        rows.append({**_row(recipe_name, recipe, micro_batch, rate, dist_info), "zero_stage": stage})
    destroy_process_group()
    return rows


def count_host_calls(step: EngineStep, batch: int) -> dict[str, float]:
    """Profile three steps. Returns launches per step and the share of the time that the host waits for the device.

    On a CPU, nothing is launched and nothing waits; the number of operators is returned instead.
    """
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(3):
            step(batch)
        step.synchronize()
    events = profiled.key_averages()
    if not on_gpu:
        return {"operators": sum(event.count for event in events if event.key.startswith("aten::")) / 3}
    waits_us = sum(event.cpu_time_total for event in events if event.key in WAIT_CALLS)
    return {
        "launches": sum(event.count for event in events if event.key.startswith(LAUNCH_CALLS)) / 3,
        "host_wait_ms": waits_us / 1e3 / 3,
    }


def _recipe(scope: Context, name: str, micro_batch: int, ranks: int, *overrides: str) -> Recipe:
    batch = (f"engine.micro_batch={micro_batch}", f"data.global_batch={micro_batch * ranks}")
    return scope.recipe(name, *batch, *overrides)


def _row(name: str, recipe: Recipe, batch: int, rate: float, dist_info: DistInfo) -> dict[str, Any]:
    """Return a measurement as a row; rate is in images/s of all ranks."""
    peak = peak_flops(dist_info.device, recipe.engine.precision)
    flops = rate * training_flops(forward_flops(recipe, batch)) / dist_info.world_size
    return {
        "recipe": name,
        "micro_batch": batch,
        "ranks": dist_info.world_size,
        "images_per_s": round(rate, 1),
        "mfu": flops / peak if peak else None,
    }
