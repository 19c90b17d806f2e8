"""Cost of a recipe without running it, as pure functions of the recipe and of hardware figures.

Parameters, FLOPs and activations are counted on torch's meta device. Time is a model: peak FLOP/s x MFU, with
a loader and a network that are never the bottleneck. estimate/memory.py has the memory.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate.activation_memory import activation_bytes
from pipeline.estimate.memory import GIB, OVERHEAD_GIB, Memory, estimate_memory, micro_batch_limits
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import Recipe
from pipeline.recipe.sections import AUTO, is_auto
from pipeline.recipe.training import choose_micro_batch
from pipeline.train.micro_batch import MicroBatchLimits
from pipeline.train.sharded_state import checkpoint_bytes

IMAGENET_SAMPLES = 1_281_167  # training images of ImageNet-1k
SAMPLES_PER_SHARD = 1_150  # ImageNet's JPEGs, 110 kB on average, in data_prep's shards of 128 MB
PUBLISHED_MINUTES = {
    ("mae", "vit_base"): 7.5,
    ("mae", "vit_large"): 12.1,
    ("mae", "vit_huge"): 21.1,
    ("efficient_mae", "vit_base"): 6.0,
    ("efficient_mae", "vit_large"): 8.9,
    ("efficient_mae", "vit_huge"): 14.9,
}
"""Minutes per ImageNet epoch at 224 px on 4 A100: Efficient MAE, Table 3."""


@dataclass(frozen=True)
class Plan:
    """Cost of a recipe, as `plan --json` prints it."""

    method: str
    encoder: str
    parameters: int
    encoder_parameters: int
    forward_gflops: float
    """10^9 FLOPs of one image alone; a multiply-add counts as two."""
    step_gflops: float
    """10^9 FLOPs per image of a micro batch, forward and backward, including recomputed activations."""
    gpu: str
    gpus: int
    """GPUs of all nodes."""
    nodes: int
    precision: str
    micro_batch: int
    """The recipe's, limited to a GPU's share of the global batch; or chosen, if the recipe has auto."""
    recipe_micro_batch: int | Literal["auto"]
    masked_patches: int
    """Per image; with EMAE per part."""
    decoder_slots: int | None
    """Efficient MAE: masked patches that the decoder predicts."""
    mean_kept_patches: float | None
    """Efficient MAE: masked patches that the threshold keeps, on average over random masks."""
    published_minutes: float | None
    """Per epoch on 4 A100, for this method and model."""
    published_mfu: float | None
    """Share of the A100's peak FLOP/s that these minutes imply."""
    accumulation: int
    """Gradient accumulation steps."""
    global_batch: int
    memory: list[Memory]
    mfu: float
    images_per_s: float
    """On all GPUs."""
    samples: int
    steps: int
    hours: float
    gpu_hours: float
    shards: int
    shards_per_rank: float
    checkpoint_gib: float
    """On disk, see `checkpoint_bytes`."""


def plan(
    recipe: Recipe,
    *,
    gpus: int = 8,
    nodes: int = 1,
    gpu: str = "h100",
    mfu: float = 0.4,
    samples: int = IMAGENET_SAMPLES,
    shards: int | None = None,
) -> Plan:
    """Estimate the cost of a recipe.

    Args:
        recipe: What to train.
        gpus: GPUs per node.
        nodes: Number of nodes.
        gpu: A name in `GPUS`.
        mfu: Share of the peak FLOP/s that the GPU reaches, recomputed activations included, in (0, 1].
        samples: Size of the data set.
        shards: Number of shards; None: estimated from the samples.

    Raises:
        UserError: If the GPU is unknown or does not support the recipe's precision, a number is out of range,
            or the global batch cannot be divided among the GPUs.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown; known are {', '.join(GPUS)}")
    if recipe.engine.precision == "bf16" and not GPUS[gpu].bf16:
        raise UserError(f"--gpu {gpu}: does not support bf16, the recipe's; --set engine.precision=fp16")
    for name, value in {"--gpus": gpus, "--nodes": nodes, "samples": samples}.items():
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must lie in (0, 1]")
    world_size = gpus * nodes
    recipe_micro_batch = recipe.engine.micro_batch
    recipe = resolve_recipe(recipe, world_size, gpu)
    with torch.device("meta"):
        method = build_method(recipe)
    parameters = sum(p.numel() for p in method.parameters())
    step_flops = step_flops_per_image(recipe)
    images_per_s = world_size * mfu * peak_flops(recipe, gpu) / step_flops
    steps = recipe.total_steps(samples)
    hours = steps * recipe.data.global_batch / images_per_s / 3600
    shards = shards or -(-samples // SAMPLES_PER_SHARD)
    width, depth, heads = recipe.model.size
    masks_decoder = recipe.method.name == "efficient_mae" or (
        recipe.method.name == "emae" and recipe.method.emae.difficulty_flatten
    )
    minutes, published_mfu = _published_speed(recipe, step_flops)
    return Plan(
        method=recipe.method.name,
        encoder=f"{recipe.model.name} (width {width}, depth {depth}, heads {heads}, patch {recipe.model.patch_size})",
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in method.encoder.parameters()),
        forward_gflops=forward_flops(recipe) / 1e9,
        step_gflops=step_flops / 1e9,
        gpu=gpu,
        gpus=world_size,
        nodes=nodes,
        precision=recipe.engine.precision,
        micro_batch=recipe.engine.micro_batch,
        recipe_micro_batch=recipe_micro_batch,
        masked_patches=recipe.num_patches - recipe.num_visible,
        decoder_slots=recipe.num_predicted if masks_decoder else None,
        mean_kept_patches=recipe.mean_kept_patches if masks_decoder else None,
        published_minutes=minutes,
        published_mfu=published_mfu,
        accumulation=recipe.gradient_accumulation_steps(world_size),
        global_batch=recipe.data.global_batch,
        memory=[
            estimate_memory(
                recipe,
                parameters,
                activation_bytes(recipe),
                world_size,
                memory_gib(gpu),
                recipe.engine.micro_batch,
                stage,
                offload,
            )
            for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))
        ],
        mfu=mfu,
        images_per_s=images_per_s,
        samples=samples,
        steps=steps,
        hours=hours,
        gpu_hours=hours * world_size,
        shards=shards,
        shards_per_rank=shards / world_size,
        checkpoint_gib=checkpoint_bytes(recipe, parameters) / GIB,
    )


def step_flops_per_image(recipe: Recipe) -> float:
    """Return the FLOPs per image of a training step, including recomputed activations."""
    batch = 1 if is_auto(recipe.engine.micro_batch) else recipe.engine.micro_batch
    forward = forward_flops(recipe, batch)
    return training_flops(forward) + forward * recipe.engine.activation_checkpointing


def peak_flops(recipe: Recipe, gpu: str) -> float:
    """Return the peak FLOP/s of a GPU in the recipe's precision."""
    return 1e12 * (GPUS[gpu].bits32 if recipe.engine.precision == "fp32" else GPUS[gpu].bits16)


def _published_speed(recipe: Recipe, step_flops: float) -> tuple[float | None, float | None]:
    """Return the published minutes per epoch of this method and model, and the MFU that they imply."""
    minutes = PUBLISHED_MINUTES.get((recipe.method.name, recipe.model.name))
    if minutes is None or recipe.data.image_size != 224:
        return None, None
    return minutes, IMAGENET_SAMPLES * step_flops / (60 * minutes * 4 * 1e12 * GPUS["a100"].bits16)


def memory_gib(gpu: str) -> float:
    """Return a GPU's memory in GiB."""
    return GPUS[gpu].memory_gb * 1e9 / GIB


def pretraining_limits(recipe: Recipe, world_size: int, available_gib: float) -> MicroBatchLimits:
    """Return the limits of `engine.micro_batch: auto` on GPUs with this memory."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_method(recipe).parameters())
    flops = step_flops_per_image(recipe)
    return micro_batch_limits(recipe, parameters, activation_bytes(recipe), flops, world_size, available_gib)


def resolve_recipe(recipe: Recipe, world_size: int, gpu: str) -> Recipe:
    """Return the recipe with a micro batch for these GPUs: chosen if it is auto, else limited to a GPU's share.

    Raises:
        UserError: If it is auto, and the global batch cannot be divided among the GPUs.
    """
    if is_auto(recipe.engine.micro_batch):
        share = recipe.images_per_rank(world_size)
        limit = pretraining_limits(recipe, world_size, memory_gib(gpu)).limit
        return recipe.with_micro_batch(choose_micro_batch(share, recipe.micro_batch_unit, limit))
    share, remainder = divmod(recipe.data.global_batch, world_size)
    if remainder or share % recipe.data.crops_per_image or not 0 < share < recipe.engine.micro_batch:
        return recipe
    return recipe.with_micro_batch(share)


def format_plan(plan: Plan) -> str:
    """Format a plan as text."""
    batch = f"{plan.global_batch} = {plan.micro_batch} per GPU x {plan.accumulation} accumulation steps x "
    batch += f"{plan.gpus} GPUs"
    if plan.recipe_micro_batch == AUTO:
        batch += " (micro batch chosen)"
    elif plan.micro_batch < plan.recipe_micro_batch:
        batch += (
            f"; the recipe's {plan.recipe_micro_batch} per GPU exceed a GPU's share: "
            f"--set engine.micro_batch={plan.micro_batch}"
        )
    duration = f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{60 * plan.hours:.1f} minutes"
    slots, published = [], []
    if plan.decoder_slots is not None:
        slots = [
            f"decoder slots   {plan.decoder_slots} of {plan.masked_patches} masked patches; the threshold keeps "
            f"{plan.mean_kept_patches:.1f} on average"
        ]
    if plan.published_minutes is not None:
        published = [
            f"published       {plan.published_minutes:g} minutes per epoch on 4 a100 (Efficient MAE, Table 3): "
            f"{plan.published_mfu:.0%} MFU"
        ]
    lines = [
        f"{plan.method}, {plan.encoder}",
        f"parameters      {plan.parameters / 1e6:.1f} M, encoder {plan.encoder_parameters / 1e6:.1f} M",
        f"one image       {plan.forward_gflops:.1f} GFLOP forward ({plan.forward_gflops / 2:.1f} G multiply-"
        f"adds), {plan.step_gflops:.1f} per training step",
        *slots,
        f"batch           {batch}",
        f"speed           {plan.images_per_s:,.0f} images/s on {plan.gpus} {plan.gpu} in {plan.nodes} "
        f"node{'s' * (plan.nodes > 1)}, {plan.precision}, at {plan.mfu:.0%} MFU",
        *published,
        f"schedule        {plan.steps:,} steps, {plan.samples:,} samples per epoch: {duration}, "
        f"{plan.gpu_hours:,.{0 if plan.gpu_hours >= 10 else 1}f} GPU-hours",
        f"data            {plan.shards:,} shards, {plan.shards_per_rank:.1f} per rank",
        f"checkpoint      {plan.checkpoint_gib:.1f} GiB",
        f"memory per GPU  {'ZeRO':<12}{'states':>9}{'activations':>13}{'loader':>8}{'total':>8}   largest micro batch",
    ]
    lines += [
        f"{'':16}{f'{m.zero_stage}, offload' if m.host else m.zero_stage:<12}{m.states:>8.1f}G"
        f"{m.activations:>12.1f}G{m.loader:>7.1f}G{m.total:>7.1f}G{m.largest_micro_batch:>22}"
        + (f", and {m.host:.1f}G of host memory" if m.host else "")
        for m in plan.memory
    ]
    lines.append(
        f"Counted: parameters, FLOPs, activations. Assumed: the MFU, the loader's memory, {OVERHEAD_GIB:.0f} GiB of "
        "overhead per GPU, no waiting for data or network."
    )
    return "\n".join(lines)
