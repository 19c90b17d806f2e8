"""Model of communication and checkpoint time on several nodes. Its assumptions; none of them is measured:

- Every step runs at the same MFU, whatever a GPU's share of the batch is.
- Communication inside a node costs nothing. Between n nodes a collective is one ring: a node's link carries
  (n - 1) / n of the bytes for a reduce-scatter or an all-gather, twice that for an all-reduce.
- Weights are sent in the recipe's precision, gradients in fp32, except with fp16. As in DeepSpeed 0.19.8,
  ZeRO 0 and 1 all-reduce the gradients once per step and ZeRO 2 once per micro batch (each rank keeps its
  shard); ZeRO 3 reduce-scatters them once per micro batch. ZeRO 1 and 2 all-gather the updated weights; ZeRO
  3 all-gathers the weights for the forward and the backward pass of every micro batch.
- Communication during a backward pass (gradients; with ZeRO 3 also weights) overlaps with it, as overlap_comm
  in ds_configs/ requests. The all-gather of updated weights does not, and neither do the gradients with ZeRO
  0, and with ZeRO 1 in bf16, which are sent after the backward pass.
- All ranks together write a checkpoint at the file system's rate.
"""

from dataclasses import dataclass

import torch

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate.plan import peak_flops, resolve_recipe, step_flops_per_image
from pipeline.methods import build_method
from pipeline.recipe import Recipe
from pipeline.train.sharded_state import checkpoint_bytes

BACKWARD_SHARE = 2 / 3
"""The backward pass's share of a step's FLOPs."""


@dataclass(frozen=True)
class Scale:
    """Estimate for one number of nodes."""

    nodes: int
    gpus: int
    """GPUs of all nodes."""
    micro_batch: int
    """As in `Plan`."""
    accumulation: int
    """Gradient accumulation steps."""
    compute_s: float
    """Seconds of computation per step."""
    link_gb: dict[int, float]
    """GB per step over a node's link, by ZeRO stage."""
    step_s: dict[int, float]
    """Seconds per step, including communication that does not overlap, by ZeRO stage."""
    efficiency: dict[int, float]
    """Images/s relative to the same nodes without communication, by ZeRO stage."""
    images_per_s: float
    """With the recipe's ZeRO stage."""


@dataclass(frozen=True)
class Scaling:
    """Estimates for increasing numbers of nodes, as `plan --json` prints them."""

    link_gbit: float
    """Bandwidth of a node's link, all adapters together, in 10^9 bits/s."""
    storage_gb: float
    """Write rate of the file system, in 10^9 bytes/s."""
    checkpoint_gb: float
    checkpoint_s: float
    scales: list[Scale]


def estimate_scaling(
    recipe: Recipe, *, gpus: int, nodes: int, gpu: str, mfu: float, link_gbit: float | None = None, storage_gb: float
) -> Scaling:
    """Estimate 1, 2, 4, ... and `nodes` nodes of `gpus` GPUs, if the global batch divides among them.

    The arguments are those of `plan`, already validated, and of `Scaling`. Without `link_gbit` a node has the adapters
    that `GPUS` lists.

    Raises:
        UserError: If a rate is not positive.
    """
    link_gbit = GPUS[gpu].link_gbit if link_gbit is None else link_gbit
    for name, value in {"--link": link_gbit, "--storage": storage_gb}.items():
        if not value > 0:
            raise UserError(f"{name} {value}: must be positive")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_method(recipe).parameters())
    weight_bytes = parameters * (4 if recipe.engine.precision == "fp32" else 2)
    gradient_bytes = parameters * (2 if recipe.engine.precision == "fp16" else 4)
    counts = sorted({nodes, *(2**power for power in range(nodes.bit_length()) if 2**power < nodes)})
    counts = [count for count in counts if recipe.data.global_batch % (count * gpus) == 0]
    largest = resolve_recipe(recipe, counts[-1] * gpus, gpu) if counts else recipe
    image_s = step_flops_per_image(largest) / (peak_flops(recipe, gpu) * mfu)
    scales = [
        _estimate_scale(
            resolve_recipe(recipe, count * gpus, gpu),
            count,
            gpus,
            image_s,
            weight_bytes,
            gradient_bytes,
            link_gbit * 1e9 / 8,
        )
        for count in counts
    ]
    size = checkpoint_bytes(recipe, parameters)
    return Scaling(link_gbit, storage_gb, size / 1e9, size / storage_gb / 1e9, scales)


def _estimate_scale(
    recipe: Recipe, nodes: int, gpus: int, image_s: float, weight_bytes: int, gradient_bytes: int, bytes_per_s: float
) -> Scale:
    share = recipe.data.global_batch // (nodes * gpus)
    micro_batch = recipe.engine.micro_batch
    accumulation = -(-share // micro_batch)
    compute = share * image_s
    gather = (nodes - 1) / nodes * weight_bytes
    scatter = (nodes - 1) / nodes * gradient_bytes
    overlapping = {
        0: 0.0,
        1: 0.0 if recipe.engine.precision == "bf16" else 2 * scatter,
        2: 2 * scatter * accumulation,
        3: (scatter + gather) * accumulation,
    }
    exposed = {0: 2 * scatter, 1: gather + 2 * scatter - overlapping[1], 2: gather, 3: gather * accumulation}
    step_s = {}
    for stage, volume in overlapping.items():
        # ZeRO 0 and 1 communicate during the last micro batch's backward pass, ZeRO 2 and 3 during all.
        backward = BACKWARD_SHARE * compute / (accumulation if stage < 2 else 1)
        step_s[stage] = compute + max(0.0, volume / bytes_per_s - backward) + exposed[stage] / bytes_per_s
    return Scale(
        nodes=nodes,
        gpus=nodes * gpus,
        micro_batch=micro_batch,
        accumulation=accumulation,
        compute_s=compute,
        link_gb={stage: (overlapping[stage] + exposed[stage]) / 1e9 for stage in overlapping},
        step_s=step_s,
        efficiency={stage: compute / seconds for stage, seconds in step_s.items()},
        images_per_s=recipe.data.global_batch / step_s[recipe.engine.zero_stage],
    )


def format_scaling(result: Scaling) -> str:
    """Format the estimates as a table."""
    lines = [
        f"scaling, a model  {result.link_gbit:,.0f} Gbit/s per node; its assumptions: docs/cluster.md",
        f"{'nodes':>5}{'GPUs':>6}{'batch/GPU':>13}{'compute':>12}   GB per step over a node's link, and "
        "efficiency, by ZeRO stage",
    ]
    for scale in result.scales:
        stages = "   ".join(
            f"{stage}: {scale.link_gb[stage]:.2f} {scale.efficiency[stage]:4.0%}" for stage in scale.link_gb
        )
        batch = f"{scale.accumulation} x {scale.micro_batch}"
        lines.append(f"{scale.nodes:>5}{scale.gpus:>6}{batch:>13}{scale.compute_s:>10.2f} s   {stages}")
    size, seconds, rate = result.checkpoint_gb, result.checkpoint_s, result.storage_gb
    lines.append(f"checkpoint        {size:.1f} GB, {seconds:.0f} s at {rate:g} GB/s")
    return "\n".join(lines)
