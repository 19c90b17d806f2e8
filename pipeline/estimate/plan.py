"""What a recipe costs, without running it: pure functions of the recipe and of the hardware's figures.

Parameters, operations and activations are counted on shapes alone (torch's meta device). Time is a model:
peak arithmetic x MFU, with a loader and a network that keep up. Memory is counted but for `OVERHEAD_GIB`.
"""

from dataclasses import dataclass

import torch

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate.activation_memory import activation_bytes
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import Recipe
from pipeline.train.sharded_state import checkpoint_bytes

IMAGENET = 1_281_167  # training images of ImageNet-1k
SHARD_SAMPLES = 1_150  # ImageNet's JPEGs, 110 kB on average, in data_prep's shards of 128 MB
OVERHEAD_GIB = 3.0  # assumed: CUDA context, NCCL, DeepSpeed's communication buckets, the loader's batches
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """A GPU's memory with one ZeRO stage, in GiB."""

    zero_stage: int
    offload: str
    """As `engine.offload`."""
    states: float
    """Weights, gradients and optimiser, this GPU's share."""
    activations: float
    """What the backward pass of a micro batch needs."""
    total: float
    largest_micro_batch: int
    """0 where not even one image fits."""
    host: float
    """The host's memory that the rank's share of the optimiser takes there."""


@dataclass(frozen=True)
class Plan:
    method: str
    encoder: str
    parameters: int
    encoder_parameters: int
    forward_gflops: float
    """10^9 floating-point operations of one image alone; a multiply-add counts as two."""
    step_gflops: float
    """An image's share of a micro batch, forward and backward, as the device computes them: with activation
    checkpointing forward once more."""
    gpu: str
    gpus: int
    """In all nodes together."""
    nodes: int
    precision: str
    micro_batch: int
    """The recipe's, or a GPU's whole share of the global batch where that is less."""
    recipe_micro_batch: int
    accumulation: int
    global_batch: int
    memory: list[Memory]
    mfu: float
    images_per_s: float
    """Of all GPUs together."""
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
    samples: int = IMAGENET,
    shards: int | None = None,
) -> Plan:
    """What the recipe costs on `nodes` machines of `gpus` each, if a GPU computes at `mfu` (0 to 1) of its
    peak, what activation checkpointing computes again included.

    `samples`, `shards`: of the data set. Where the GPUs would take more than the global batch at once, a
    micro batch is a GPU's share of it. UserError: an unknown GPU or one that can't compute in the recipe's
    precision, a number out of range, or a global batch that does not divide among the GPUs.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown; known are {', '.join(GPUS)}")
    if recipe.engine.precision == "bf16" and not GPUS[gpu].bf16:
        raise UserError(f"--gpu {gpu}: can't compute in bf16, the recipe's; --set engine.precision=fp16")
    for name, value in {"--gpus": gpus, "--nodes": nodes, "samples": samples}.items():
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must lie in (0, 1]")
    world = gpus * nodes
    recipe_micro_batch = recipe.engine.micro_batch
    recipe = _shared(recipe, world)
    with torch.device("meta"):
        method = build_method(recipe)
    parameters = sum(p.numel() for p in method.parameters())
    forward = forward_flops(recipe, recipe.engine.micro_batch)
    training = training_flops(forward)
    peak = 1e12 * (GPUS[gpu].bits32 if recipe.engine.precision == "fp32" else GPUS[gpu].bits16)
    computed = training + forward * recipe.engine.activation_checkpointing
    images_per_s = world * mfu * peak / computed
    steps = recipe.total_steps(samples)
    hours = steps * recipe.data.global_batch / images_per_s / 3600
    shards = shards or -(-samples // SHARD_SAMPLES)
    width, depth, heads = recipe.model.size
    return Plan(
        method=recipe.method.name,
        encoder=f"{recipe.model.name} (width {width}, depth {depth}, heads {heads}, "
        f"patch {recipe.model.patch_size})",
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in method.encoder.parameters()),
        forward_gflops=forward_flops(recipe) / 1e9,
        step_gflops=computed / 1e9,
        gpu=gpu,
        gpus=world,
        nodes=nodes,
        precision=recipe.engine.precision,
        micro_batch=recipe.engine.micro_batch,
        recipe_micro_batch=recipe_micro_batch,
        accumulation=recipe.accumulation(world),
        global_batch=recipe.data.global_batch,
        memory=memory(recipe, parameters, world, GPUS[gpu].memory_gb * 1e9 / GIB),
        mfu=mfu,
        images_per_s=images_per_s,
        samples=samples,
        steps=steps,
        hours=hours,
        gpu_hours=hours * world,
        shards=shards,
        shards_per_rank=shards / world,
        checkpoint_gib=checkpoint_bytes(recipe, parameters) / GIB,
    )


def _shared(recipe: Recipe, world: int) -> Recipe:
    """The recipe, with the largest micro batch that `world` GPUs can take: no more than their shares."""
    share, rest = divmod(recipe.data.global_batch, world)
    if rest or share % recipe.data.crops_per_image or not 0 < share < recipe.engine.micro_batch:
        return recipe
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"micro_batch": share})})


def memory(recipe: Recipe, parameters: int, world: int, available_gib: float) -> list[Memory]:
    """A GPU's memory by ZeRO stage. GPUs share the optimiser from stage 1, gradients from 2, weights in 3."""
    per_image = activation_bytes(recipe)
    weights, gradients, optimizer = (parameters * size for size in _state_bytes(recipe))
    # ZeRO 1 in bf16 keeps the last micro batch's gradients beside their sums (BF16_Optimizer's
    # clear_lp_grads=False).
    beside = 2 * parameters if recipe.engine.precision == "bf16" else 0
    table = []
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        states = (
            weights / (world if stage >= 3 else 1)
            # With offload ZeRO 3 adds gradients up in the host's memory, ZeRO 2 still on the GPU.
            + (0 if offload and stage == 3 else gradients / (world if stage >= 2 else 1))
            + (0 if offload else optimizer / (world if stage >= 1 else 1))
            + (beside if stage == 1 else 0)
        ) / GIB
        activations = recipe.engine.micro_batch * per_image / GIB
        room = available_gib - OVERHEAD_GIB - states
        table.append(
            Memory(
                zero_stage=stage,
                offload="optimizer" if offload else "none",
                states=states,
                activations=activations,
                total=states + activations + OVERHEAD_GIB,
                largest_micro_batch=max(0, int(room * GIB // per_image)),
                host=(optimizer + gradients) / world / GIB if offload else 0.0,
            )
        )
    return table


def _state_bytes(recipe: Recipe) -> tuple[int, int, int]:
    """Bytes a parameter: weights, gradients, optimiser. In 16 bits the optimiser holds float32 weights of its
    own, and gradients are added up in float32 (engine_config.py); a moving average lies beside them."""
    average = 0 if recipe.train.ema_decay is None else 4
    return (4, 4, 8 + average) if recipe.engine.precision == "fp32" else (2, 4, 12 + average)


def format_plan(plan: Plan) -> str:
    """The plan for a reader."""
    lines = [
        f"{plan.method}, {plan.encoder}",
        f"parameters      {plan.parameters / 1e6:.1f} M, encoder {plan.encoder_parameters / 1e6:.1f} M",
        f"one image       {plan.forward_gflops:.1f} GFLOP forward, {plan.step_gflops:.1f} a training step "
        f"({plan.forward_gflops / 2:.1f} G multiply-adds forward)",
        f"batch           {plan.global_batch} = {plan.micro_batch} a GPU x {plan.accumulation} accumulated "
        f"x {plan.gpus} GPUs"
        + (
            f"; the recipe's {plan.recipe_micro_batch} a GPU are more than that: "
            f"--set engine.micro_batch={plan.micro_batch}"
            if plan.micro_batch < plan.recipe_micro_batch
            else ""
        ),
        f"speed           {plan.images_per_s:,.0f} images/s on {plan.gpus} {plan.gpu} in {plan.nodes} "
        f"node{'s' * (plan.nodes > 1)}, {plan.precision}, at {plan.mfu:.0%} of the peak",
        f"schedule        {plan.steps:,} steps of {plan.samples:,} samples: "
        + (f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{60 * plan.hours:.1f} minutes")
        + f", {plan.gpu_hours:,.{0 if plan.gpu_hours >= 10 else 1}f} GPU-hours",
        f"data            {plan.shards:,} shards, {plan.shards_per_rank:.1f} a rank",
        f"checkpoint      {plan.checkpoint_gib:.1f} GiB",
        f"memory a GPU    {'ZeRO':<12}{'states':>9}{'activations':>13}{'total':>8}   largest micro batch",
    ]
    lines += [
        f"{'':16}{f'{m.zero_stage}, offload' if m.host else m.zero_stage:<12}{m.states:>8.1f}G"
        f"{m.activations:>12.1f}G{m.total:>7.1f}G{m.largest_micro_batch:>22}"
        + (f", and {m.host:.1f}G of the host a GPU" if m.host else "")
        for m in plan.memory
    ]
    lines.append(
        f"Counted: parameters, operations, activations. Assumed: the MFU, {OVERHEAD_GIB:.0f} GiB a GPU more, "
        "and a loader and a network that keep up."
    )
    return "\n".join(lines)
