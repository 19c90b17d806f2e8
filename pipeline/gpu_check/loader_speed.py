"""Check 11: does the loader deliver more images than a ViT-L consumes?"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.data.timing import time_steps
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.recipe import Recipe

FACTOR = 1.2
"""Smallest ratio of the loader's images/s to those of the engine."""
NUM_WARMUP = 6
"""More batches than are decoded ahead."""


def check_loader_speed(context: Context) -> Finding:
    """Measure the loader alone with 1, 2, 4, ... decoding threads."""
    dist_info = init_dist_env()
    batch, seconds = (256, 5.0) if context.on_gpu else (8, 0.5)
    recipe = context.recipe("vitl16_mae", f"engine.micro_batch={batch}", f"data.global_batch={batch}")
    threads = sorted({1, *(2**n for n in range(1, dist_info.num_cpus.bit_length()) if 2**n <= dist_info.num_cpus)})
    rows = [measure_loader(recipe, context.data, number, dist_info, seconds) for number in threads]
    demand = max(
        (row["images_per_s"] for row in context.rows.get("engine-speed", []) if row["recipe"] == "vitl16_mae"),
        default=0,
    )
    return judge_rates(rows, demand, context.on_gpu)


def judge_rates(rows: list[dict[str, Any]], demand: float, on_gpu: bool) -> Finding:
    """Compare the best rate with what the engine consumes on one GPU.

    Args:
        demand: images/s of check 10; 0 if it has not run.
    """
    best = max(rows, key=lambda row: row["images_per_s"])
    value = (
        f"{best['images_per_s']:,.0f} images/s with {best['threads']} threads, {best['cpu_ms']:.2f} CPU ms per image"
    )
    if best["gpu_share"] is not None:
        value += f"; its work takes {best['gpu_share']:.0%} of the GPU's time"
    bound = f">= {FACTOR} x vitl16_mae of engine-speed"
    if not on_gpu:
        return Finding(f"{value} on the CPU, which decodes and trains on the same cores", bound, "measured", rows)
    if not demand:
        return Finding(f"{value}; engine-speed has not run", bound, "measured", rows)
    ratio = best["images_per_s"] / demand
    return Finding(f"{value}: {ratio:.1f} x the engine's {demand:,.0f}", bound, judge(ratio >= FACTOR), rows)


def measure_loader(recipe: Recipe, shards: str, threads: int, dist_info: DistInfo, seconds: float) -> dict[str, Any]:
    """Return images/s, CPU milliseconds per image, and the share of the time that the GPU runs the loader's kernels."""
    device = dist_info.device
    loader = Loader(ShardReader(shards, recipe.data), recipe, 1, device, threads=threads)
    try:
        timing = time_steps(loader.next, device, warmup=NUM_WARMUP, min_steps=8, min_seconds=seconds)
        gpu_share = _gpu_share(loader, device) if device.type == "cuda" else None
    finally:
        loader.close()
    images = timing.steps * recipe.engine.micro_batch
    return {
        "threads": threads,
        "images_per_s": round(images / timing.seconds, 1),
        "cpu_ms": 1e3 * timing.cpu_seconds / images,
        "gpu_share": gpu_share,
    }


def _gpu_share(loader: Loader, device: torch.device) -> float:
    """Profile the loader: CUPTI also records the kernels and copies that DALI starts in this process."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        elapsed = time_steps(loader.next, device, warmup=0, min_steps=10).seconds
    events = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    return sum(event.self_device_time_total for event in events) / 1e6 / elapsed
