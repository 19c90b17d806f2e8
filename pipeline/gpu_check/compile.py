"""Check 9: torch.compile has no graph break and keeps the loss; by how much it is faster."""

import time

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import init_dist_env
from pipeline.estimate.engine_step import EngineStep
from pipeline.gpu_check.check import Context, Finding, judge, largest_difference
from pipeline.train import engine

LOSS_BOUND = 1e-2
"""Largest relative difference from the eager loss."""


def check_compile(context: Context) -> Finding:
    """Train the same steps eagerly and compiled."""
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    batch, steps = (128, 20) if context.on_gpu else (4, 3)
    seconds, losses = {}, {}
    first_step_s = 0.0
    for compiled in (False, True):
        recipe = context.recipe(
            "vitl16_mae",
            *(() if context.on_gpu else ("model.depth=1",)),
            f"engine.compile={str(compiled).lower()}",
            f"engine.micro_batch={batch}",
            f"data.global_batch={batch}",
        )
        step = EngineStep(recipe, dist_info)
        started = time.perf_counter()
        losses[compiled] = [step(batch).item()]
        first_step_s = time.perf_counter() - started
        losses[compiled] += [step(batch).item() for _ in range(2)]
        seconds[compiled] = step.measure(batch, steps)
        step.close()
    from torch._dynamo.utils import counters  # takes seconds, and has been imported to compile

    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    destroy_process_group()
    difference = largest_difference(losses[True], losses[False])
    return judge_compile(breaks, graphs, difference, first_step_s, seconds[False] / seconds[True])


def judge_compile(breaks: int, graphs: int, difference: float, first_step_s: float, speed_up: float) -> Finding:
    """Judge the numbers of graph breaks and graphs, and the largest relative difference of the losses."""
    return Finding(
        f"{graphs} graphs, {breaks} graph breaks, loss within {difference:.1e}, first step {first_step_s:.0f} s, "
        f"{speed_up:.2f} x the eager speed",
        f"compiled without graph break; loss within {LOSS_BOUND:.0e} of eager",
        judge(graphs > 0 and not breaks and difference <= LOSS_BOUND),
        [{"first_step_s": first_step_s, "speed_up": speed_up}],
    )
