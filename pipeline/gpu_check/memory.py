"""Check 12: the memory of a training step against `plan`'s estimate, at two micro batches."""

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.hardware import used_memory_gib
from pipeline.distributed.launch import init_dist_env
from pipeline.estimate.engine_step import EngineStep
from pipeline.estimate.plan import plan
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.recipe import Recipe
from pipeline.train import engine

TOLERANCE = 0.10
"""Share of the estimate by which the measured memory may exceed it."""

MemoryReading = Callable[[], float]
"""Returns GiB in use."""


def check_memory(context: Context, read: MemoryReading | None = None) -> Finding:
    """Train real batches of two sizes, and read the memory in use.

    Args:
        read: None: that of the whole device, without a GPU that of this process.
    """
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    if read is None:
        read = (lambda: used_memory_gib(dist_info.device) or 0.0) if context.on_gpu else _host_reading()
    batches = (64, 128) if context.on_gpu else (4, 8)
    rows = []
    for batch in batches:
        if context.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        recipe = context.recipe("vitl16_mae", f"engine.micro_batch={batch}", f"data.global_batch={batch}")
        step = EngineStep(recipe, dist_info)
        loader = Loader(ShardReader(context.data, recipe.data), recipe, step.method.noise_size, dist_info.device)
        for _ in range(6):  # optimizer state and DALI's buffers exist after the first ones
            step(batch, loader.next().images)
        step.synchronize()
        rows.append({"micro_batch": batch, "measured_gib": read(), "estimated_gib": estimate_gib(recipe)})
        rows[-1]["torch_gib"] = torch.cuda.max_memory_reserved() / 2**30 if context.on_gpu else None
        loader.close()
        step.close()
    destroy_process_group()
    return judge_memory(
        rows, "the GPU's memory in use" if context.on_gpu else "no GPU: resident memory, less the imports'"
    )


def estimate_gib(recipe: Recipe) -> float:
    """Return `plan`'s estimate for one GPU and the recipe's ZeRO stage."""
    cost = plan(recipe, gpus=1)  # the memory does not depend on the GPU
    return next(m.total for m in cost.memory if m.zero_stage == recipe.engine.zero_stage and m.offload == "none")


def judge_memory(rows: Sequence[dict[str, Any]], what: str) -> Finding:
    """Compare measured with estimated memory at each micro batch."""
    ratios = [row["measured_gib"] / row["estimated_gib"] for row in rows]
    texts = [f"{row['measured_gib']:.2f} of {row['estimated_gib']:.2f} GiB at {row['micro_batch']}" for row in rows]
    return Finding(
        f"{what}: {', '.join(texts)}",
        f"<= {1 + TOLERANCE:.2f} x plan's estimate",
        judge(max(ratios) <= 1 + TOLERANCE),
        list(rows),
    )


def _host_reading() -> MemoryReading:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
