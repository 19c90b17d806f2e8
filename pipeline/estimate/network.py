"""What more nodes bring: a model of communication and checkpoints, on paper.

Assumed, and nothing of it measured here:
- Every step's arithmetic runs at the same MFU, however small a GPU's share of the batch becomes.
- Inside a node the links are fast enough not to count. Between n nodes a collective runs as one ring: a
  node's link carries (n - 1) / n times the bytes for a reduce-scatter or an all-gather, twice that for an
  all-reduce.
- Weights travel in the recipe's precision, gradients in fp32, but for fp16's. As DeepSpeed 0.19.8 does it,
  ZeRO 0 and 1 all-reduce the gradients once a step, ZeRO 2 with every micro batch (and keeps its share of
  them), ZeRO 3 reduce-scatters them with every micro batch. ZeRO 1 and 2 gather the new weights, ZeRO 3 the
  weights for the forward and the backward pass of every micro batch.
- What goes along with a backward pass (gradients; in ZeRO 3 the weights too) hides behind it, as overlap_comm
  in ds_configs/ wants it; the gathering of new weights does not. ZeRO 0, and ZeRO 1 in bf16, begin to send
  gradients when the backward pass is done, so nothing of theirs is hidden.
- A checkpoint is written by all ranks together at the file system's rate.
"""

from dataclasses import dataclass

import torch

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import Recipe
from pipeline.train.sharded_state import checkpoint_bytes

BACKWARD = 2 / 3
"""Of a step's arithmetic, the share that is its backward pass."""


@dataclass(frozen=True)
class Scale:
    """One number of nodes."""

    nodes: int
    gpus: int
    micro_batch: int
    """Images a GPU takes at once: the recipe's, or all it has where that is less."""
    accumulation: int
    compute_s: float
    """Seconds of arithmetic a step."""
    link_gb: dict[int, float]
    """GB that a node's link carries a step, by ZeRO stage."""
    step_s: dict[int, float]
    """Seconds a step, communication that is not hidden included, by ZeRO stage."""
    efficiency: dict[int, float]
    """Images/s against as many nodes without any communication, by ZeRO stage."""
    images_per_s: float
    """At the recipe's ZeRO stage."""


@dataclass(frozen=True)
class Scaling:
    link_gbit: float
    """A node's link, in 10^9 bits/s, all its adapters together."""
    storage_gb: float
    """The file system's rate, in 10^9 bytes/s."""
    checkpoint_gb: float
    checkpoint_s: float
    scales: list[Scale]


def estimate_scaling(
    recipe: Recipe, *, gpus: int, nodes: int, gpu: str, mfu: float, link_gbit: float, storage_gb: float
) -> Scaling:
    """1, 2, 4, ... and `nodes` nodes of `gpus` GPUs each, where those can share the recipe's batch evenly.

    UserError for a number out of range.
    """
    for name, value in {"--link": link_gbit, "--storage": storage_gb}.items():
        if not value > 0:
            raise UserError(f"{name} {value}: must be positive")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_method(recipe).parameters())
    bits32 = recipe.engine.precision == "fp32"
    peak = 1e12 * (GPUS[gpu].bits32 if bits32 else GPUS[gpu].bits16)
    forward = forward_flops(recipe, recipe.engine.micro_batch)
    computed = training_flops(forward) + forward * recipe.engine.activation_checkpointing
    image_s = computed / (peak * mfu)
    weights = parameters * (4 if bits32 else 2)
    gradients = parameters * (2 if recipe.engine.precision == "fp16" else 4)
    counts = sorted({nodes, *(2**power for power in range(nodes.bit_length()) if 2**power < nodes)})
    scales = [
        _scale(recipe, count, gpus, image_s, weights, gradients, link_gbit * 1e9 / 8)
        for count in counts
        if recipe.data.global_batch % (count * gpus) == 0
    ]
    size = checkpoint_bytes(recipe, parameters)
    return Scaling(link_gbit, storage_gb, size / 1e9, size / storage_gb / 1e9, scales)


def _scale(
    recipe: Recipe, nodes: int, gpus: int, image_s: float, weights: int, gradients: int, link: float
) -> Scale:
    """image_s: seconds of arithmetic an image; weights, gradients: bytes; link: bytes a second."""
    share = recipe.data.global_batch // (nodes * gpus)
    micro = min(share, recipe.engine.micro_batch)
    accumulation = -(-share // micro)
    compute = share * image_s
    gathered = (nodes - 1) / nodes * weights
    scattered = (nodes - 1) / nodes * gradients
    behind = {
        0: 0.0,
        1: 0.0 if recipe.engine.precision == "bf16" else 2 * scattered,
        2: 2 * scattered * accumulation,
        3: (scattered + gathered) * accumulation,
    }
    between = {
        0: 2 * scattered,
        1: gathered + 2 * scattered - behind[1],
        2: gathered,
        3: gathered * accumulation,
    }
    step_s = {}
    for stage, volume in behind.items():
        backward = BACKWARD * compute / (accumulation if stage < 2 else 1)  # the last micro batch's, or all
        step_s[stage] = compute + max(0.0, volume / link - backward) + between[stage] / link
    return Scale(
        nodes=nodes,
        gpus=nodes * gpus,
        micro_batch=micro,
        accumulation=accumulation,
        compute_s=compute,
        link_gb={stage: (behind[stage] + between[stage]) / 1e9 for stage in behind},
        step_s=step_s,
        efficiency={stage: compute / seconds for stage, seconds in step_s.items()},
        images_per_s=recipe.data.global_batch / step_s[recipe.engine.zero_stage],
    )


def format_scaling(result: Scaling) -> str:
    """The table for a reader."""
    lines = [
        f"scaling, a model  {result.link_gbit:,.0f} Gbit/s a node; its assumptions: docs/cluster.md",
        f"{'nodes':>5}{'GPUs':>6}{'batch a GPU':>13}{'arithmetic':>12}   GB a step over a node's link, and "
        "efficiency, by ZeRO stage",
    ]
    for scale in result.scales:
        stages = "   ".join(
            f"{stage}: {scale.link_gb[stage]:.2f} {scale.efficiency[stage]:4.0%}" for stage in scale.link_gb
        )
        batch = f"{scale.accumulation} x {scale.micro_batch}"
        lines.append(f"{scale.nodes:>5}{scale.gpus:>6}{batch:>13}{scale.compute_s:>10.2f} s   {stages}")
    lines.append(
        f"a checkpoint      {result.checkpoint_gb:.1f} GB, {result.checkpoint_s:.0f} s at "
        f"{result.storage_gb:g} GB/s"
    )
    return "\n".join(lines)
