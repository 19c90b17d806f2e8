"""Cost of a fine-tuning recipe without running it: `plan` for detection and segmentation.

Parameters, FLOPs and activations are counted on torch's meta device, except those of losses, matching and NMS, which
depend on the images. Time is a model, as in `estimate.plan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate.activation_memory import count_activation_bytes
from pipeline.estimate.memory import GIB, OVERHEAD_GIB
from pipeline.methods.flops import training_flops
from pipeline.recipe.detection import DetectionRecipe
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.sections import VIT_SIZES
from pipeline.recipe.segmentation import SegmentationRecipe
from pipeline.tasks.detector import Detector, build_detector, run_networks, training_forward_flops
from pipeline.tasks.segmenter import Segmenter, count_forward_flops
from pipeline.train.sharded_state import checkpoint_bytes

COCO_SAMPLES = 117_266
"""Images of COCO's train2017 with instances."""
COCO_CLASSES = 80
ADE20K_SAMPLES, ADE20K_CLASSES = 20_210, 150
"""Training images and classes of ADE20K."""


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


class _Model(NamedTuple):
    """What is planned, on the meta device."""

    module: Detector | Segmenter
    forward_flops: float
    run: Callable[[int], object]
    """Runs the forward pass of training on a number of images."""


def plan_finetune(
    recipe: FinetuneRecipe, *, gpus: int, nodes: int, gpu: str, mfu: float, samples: int | None = None
) -> FinetunePlan:
    """Estimate the cost of a recipe for detection or segmentation; the arguments are those of `estimate.plan.plan`.

    Args:
        samples: None: those of COCO or ADE20K.

    Raises:
        UserError: If the recipe is for another task or for any encoder, or the GPU is unknown.
    """
    if isinstance(recipe, DetectionRecipe):
        key, encoder = "detector.encoder", recipe.detector.encoder
        samples = samples or COCO_SAMPLES
    elif isinstance(recipe, SegmentationRecipe):
        key, encoder = "segmenter.encoder", recipe.segmenter.encoder
        samples = samples or ADE20K_SAMPLES
    else:
        raise UserError(f"plan: does not support {recipe.TASK}; give a recipe of pretrain, detection or segmentation")
    if encoder is None:
        raise UserError(f"plan: the recipe is for any encoder; --set {key}=vit_base, for example")
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown; known are {', '.join(GPUS)}")
    world_size, size, engine = gpus * nodes, VIT_SIZES[encoder], recipe.engine
    model = _detector(recipe, encoder) if isinstance(recipe, DetectionRecipe) else _segmenter(recipe, encoder)
    module, forward = model.module, model.forward_flops
    parameters = sum(p.numel() for p in module.parameters())
    module.vit.set_grad_checkpointing(False)
    if engine.precision != "fp32":
        module.to(torch.bfloat16)
    activations = count_activation_bytes(module, list(module.vit.blocks), model.run, engine.activation_checkpointing)
    step = training_flops(forward) + forward * engine.activation_checkpointing
    peak = 1e12 * (GPUS[gpu].bits32 if engine.precision == "fp32" else GPUS[gpu].bits16)
    images_per_s, steps = world_size * mfu * peak / step, recipe.total_steps(samples)
    return FinetunePlan(
        task=recipe.TASK,
        encoder=f"{encoder} (width {size.width}, depth {size.depth}, heads {size.heads})",
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in module.vit.parameters()),
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


def _detector(recipe: DetectionRecipe, encoder: str) -> _Model:
    with torch.device("meta"):
        detector = build_detector(*VIT_SIZES[encoder], COCO_CLASSES, recipe)
    flops = training_forward_flops(detector, recipe)
    return _Model(detector, flops, lambda batch: run_networks(detector, recipe, batch))


def _segmenter(recipe: SegmentationRecipe, encoder: str) -> _Model:
    size, side = VIT_SIZES[encoder], recipe.data.image_size
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=side, embed_dim=size.width, depth=size.depth, num_heads=size.heads, num_classes=0
        )
        segmenter = Segmenter(vit, ADE20K_CLASSES, recipe)

    def run(batch: int) -> None:
        target = {"labels": torch.empty(side, side, dtype=torch.uint8), "extent": torch.empty(2, dtype=torch.long)}
        segmenter(torch.empty(batch, 3, side, side), torch.empty(batch, segmenter.noise_size), [target] * batch)

    return _Model(segmenter, count_forward_flops(segmenter, side), run)


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
    of_detection = "losses, matching and NMS, and the masks of the targets"
    lines.append(
        f"total: with micro batches of {plan.micro_batch} and {OVERHEAD_GIB:.0f} GiB of assumed overhead. Not counted: "
        f"{of_detection if plan.task == 'detection' else 'FLOPs of the loss'}."
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
