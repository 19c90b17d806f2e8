"""Check 14: how long writing a ViT-H's checkpoint takes, and whether it is read back as it was written."""

import time
from tempfile import gettempdir

import torch

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import init_dist_env
from pipeline.estimate.engine_step import EngineStep
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.train import checkpoint, engine
from pipeline.train.sharded_state import iter_flat_partitions


def check_checkpoint(context: Context) -> Finding:
    """Train two steps, save, train one more, and load: the fp32 weights must be those that were saved."""
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    batch = 16 if context.on_gpu else 4
    recipe = context.recipe("vith14_mae", f"engine.micro_batch={batch}", f"data.global_batch={batch}")
    step = EngineStep(recipe, dist_info)
    for _ in range(2):
        step(batch)
    saved = _weights(step)
    directory = context.scratch / "checkpoints"
    started = time.perf_counter()
    checkpoint.save(
        lambda path: engine.save(step.engine, None, path),
        lambda path: engine.consolidate_fp32_weights(step.engine, None, path),
        directory,
        2,
        {},
        recipe.train,
        dist_info,
    )
    seconds = time.perf_counter() - started
    path = directory / checkpoint.checkpoint_name(2)
    size = sum(file.stat().st_size for file in path.iterdir())
    step(batch)
    moved = any(not torch.equal(a, b) for a, b in zip(_weights(step), saved, strict=True))
    engine.load(step.engine, None, path)
    equal = all(torch.equal(a, b) for a, b in zip(_weights(step), saved, strict=True))
    destroy_process_group()
    return judge_checkpoint(size, seconds, moved and equal)


def judge_checkpoint(size: int, seconds: float, restored: bool) -> Finding:
    """Judge a checkpoint of `size` bytes that was written in `seconds` and read back."""
    rate = size / seconds / 1e9
    value = f"{size / 1e6:,.0f} MB in {seconds:.1f} s, {rate:.2f} GB/s on one rank to {gettempdir()}"
    rows = [{"bytes": size, "seconds": seconds}]
    return Finding(
        f"{value}; weights {'restored' if restored else 'differ after loading'}",
        "restored to the bit",
        judge(restored),
        rows,
    )


def _weights(step: EngineStep) -> list[torch.Tensor]:
    return [partition.tensor.detach().clone() for partition in iter_flat_partitions(step.engine)]
