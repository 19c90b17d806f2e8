"""Cost of a fine-tuning recipe without running it: `plan` for detection.

Parameters, FLOPs and activations are counted on torch's meta device, except those of losses, matching and NMS, which
depend on the images. Time is a model, as in `estimate.plan`.
"""

from dataclasses import dataclass

import torch

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate.activation_memory import count_activation_bytes
from pipeline.estimate.plan import GIB, OVERHEAD_GIB
from pipeline.methods.flops import training_flops
from pipeline.recipe.detection import DetectionRecipe
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.sections import VIT_SIZES
from pipeline.tasks.detector import build_detector, run_networks, training_forward_flops
from pipeline.train.sharded_state import checkpoint_bytes

COCO_SAMPLES = 117_266
"""Images of COCO's train2017 with instances."""
COCO_CLASSES = 80


@dataclass(frozen=True)
class StageMemory:
    """Memory per GPU with one ZeRO stage, in GiB."""

    zero_stage: int
    states: float
    """This GPU's share of weights, gradients and optimizer state."""
    total: float
    largest_micro_batch: int
    """0 if not even one image fits."""


@dataclass(frozen=True)
class FinetunePlan:
    """Cost of a recipe, as `plan --json` prints it."""

    task: str
    encoder: str
    parameters: int
    encoder_parameters: int
    image_size: int
    forward_gflops: float
    """10^9 FLOPs of one image; a multiply-add counts as two."""
    step_gflops: float
    """10^9 FLOPs of an image's forward and backward pass, including recomputed activations."""
    gpu: str
    gpus: int
    """GPUs of all nodes."""
    precision: str
    micro_batch: int
    global_batch: int
    activations_gib: float
    """Saved for the backward pass of one image."""
    memory: list[StageMemory]
    mfu: float
    images_per_s: float
    """On all GPUs."""
    samples: int
    steps: int
    hours: float
    checkpoint_gib: float


def plan_finetune(
    recipe: FinetuneRecipe, *, gpus: int, nodes: int, gpu: str, mfu: float, samples: int = COCO_SAMPLES
) -> FinetunePlan:
    """Estimate the cost of a detection recipe; the arguments are those of `estimate.plan.plan`.

    Raises:
        UserError: If the recipe is for another task or for any encoder, or the GPU is unknown.
    """
    if not isinstance(recipe, DetectionRecipe):
        raise UserError(f"plan: does not support {recipe.TASK}; give a recipe of pretrain or detection")
    if recipe.detector.encoder is None:
        raise UserError("plan: the recipe is for any encoder; --set detector.encoder=vit_base, for example")
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown; known are {', '.join(GPUS)}")
    world_size, size, engine = gpus * nodes, VIT_SIZES[recipe.detector.encoder], recipe.engine
    with torch.device("meta"):
        detector = build_detector(*size, COCO_CLASSES, recipe)
    forward = training_forward_flops(detector, recipe)
    parameters = sum(p.numel() for p in detector.parameters())
    detector.vit.set_grad_checkpointing(False)
    if engine.precision != "fp32":
        detector = detector.to(torch.bfloat16)
    activations = count_activation_bytes(
        detector,
        list(detector.vit.blocks),
        lambda batch: run_networks(detector, recipe, batch),
        engine.activation_checkpointing,
    )
    step = training_flops(forward) + forward * engine.activation_checkpointing
    peak = 1e12 * (GPUS[gpu].bits32 if engine.precision == "fp32" else GPUS[gpu].bits16)
    images_per_s, steps = world_size * mfu * peak / step, recipe.total_steps(samples)
    return FinetunePlan(
        task=recipe.TASK,
        encoder=f"{recipe.detector.encoder} (width {size.width}, depth {size.depth}, heads {size.heads})",
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in detector.vit.parameters()),
        image_size=recipe.data.image_size,
        forward_gflops=forward / 1e9,
        step_gflops=step / 1e9,
        gpu=gpu,
        gpus=world_size,
        precision=engine.precision,
        micro_batch=engine.micro_batch,
        global_batch=recipe.data.global_batch,
        activations_gib=activations / GIB,
        memory=[
            _memory(recipe, parameters, activations, world_size, GPUS[gpu].memory_gb * 1e9, stage) for stage in range(4)
        ],
        mfu=mfu,
        images_per_s=images_per_s,
        samples=samples,
        steps=steps,
        hours=steps * recipe.data.global_batch / images_per_s / 3600,
        checkpoint_gib=checkpoint_bytes(recipe, parameters) / GIB,
    )


def format_finetune_plan(plan: FinetunePlan) -> str:
    """Format a plan as text."""
    lines = [
        f"{plan.task}, {plan.encoder}, {plan.image_size} px",
        f"parameters      {plan.parameters / 1e6:.1f} M, encoder {plan.encoder_parameters / 1e6:.1f} M",
        f"one image       {plan.forward_gflops:,.0f} GFLOP forward, {plan.step_gflops:,.0f} per training step, "
        f"{plan.activations_gib:.1f} GiB of activations",
        f"speed           {plan.images_per_s:,.0f} images/s on {plan.gpus} {plan.gpu}, {plan.precision}, at "
        f"{plan.mfu:.0%} MFU",
        f"schedule        {plan.steps:,} steps of {plan.global_batch} images: {plan.hours:,.1f} hours",
        f"checkpoint      {plan.checkpoint_gib:.1f} GiB",
        f"memory per GPU  {'ZeRO':<6}{'states':>9}{'total':>9}   largest micro batch",
    ]
    lines += [
        f"{'':16}{memory.zero_stage:<6}{memory.states:>8.1f}G{memory.total:>8.1f}G{memory.largest_micro_batch:>22}"
        for memory in plan.memory
    ]
    lines.append(
        f"total: with micro batches of {plan.micro_batch} and {OVERHEAD_GIB:.0f} GiB of assumed overhead. Not counted: "
        "losses, matching and NMS, and the masks of the targets."
    )
    return "\n".join(lines)


def _memory(
    recipe: FinetuneRecipe, parameters: int, activations: int, world_size: int, available: float, stage: int
) -> StageMemory:
    """Estimate a GPU's memory: ZeRO 1 shards the optimizer state, 2 also the gradients, 3 also the weights."""
    weights, masters = (4, 0) if recipe.engine.precision == "fp32" else (2, 4)
    optimizer = 8 + masters + (0 if recipe.train.ema_decay is None else 4)
    shares = [size / (world_size if stage >= least else 1) for least, size in ((3, weights), (2, 4), (1, optimizer))]
    states = parameters * sum(shares)
    free = available - OVERHEAD_GIB * GIB - states
    total = states + recipe.engine.micro_batch * activations + OVERHEAD_GIB * GIB
    return StageMemory(stage, states / GIB, total / GIB, max(0, int(free // activations)))
