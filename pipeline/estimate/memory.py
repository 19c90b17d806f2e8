"""Memory that training needs per GPU: states and activations are counted, the rest is assumed.

The assumptions (`OVERHEAD_GIB`, `decoder_memory`) have not been measured on a GPU.
"""

from dataclasses import dataclass

from pipeline.data.decode_options import decoder_memory
from pipeline.recipe.sections import DataSection
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.micro_batch import MicroBatchLimits

GIB = 2**30
OVERHEAD_GIB = 4.0
"""Assumed memory per GPU besides states, activations and the loader: CUDA context 0.5 GiB, NCCL 1 to 1.5, the flat copy
of the gradients that DeepSpeed communicates up to 2."""
RESERVE_GIB = 4.0
"""Memory that `engine.micro_batch: auto` leaves free, for what `OVERHEAD_GIB` underestimates and for fragmentation."""
MAX_TFLOP = 80.0
"""TFLOP of a micro batch's forward and backward pass beyond which it is assumed to gain no speed: 0.16 s on an H100 at
50 % of its peak, ten times what its kernels take to launch (2,500 for a ViT-L, at 5 to 8 microseconds)."""
LOADER_THREADS = 16
"""Assumed decoding threads of a rank, if data.decode_threads is null."""


@dataclass(frozen=True)
class Memory:
    """Memory per GPU with one ZeRO stage, in GiB."""

    zero_stage: int
    offload: str
    """As `engine.offload`."""
    states: float
    """This GPU's share of weights, gradients and optimizer state."""
    activations: float
    """Saved for the backward pass of a micro batch."""
    loader: float
    """Decoded and augmented images, and the decoder's buffers."""
    total: float
    largest_micro_batch: int
    """0 if not even one image fits."""
    host: float
    """Host memory per GPU for the offloaded optimizer state."""


def estimate_memory(
    recipe: TrainingRecipe,
    parameters: int,
    image_bytes: int,
    world_size: int,
    available_gib: float,
    micro_batch: int,
    zero_stage: int,
    offload: bool,
) -> Memory:
    """Estimate a GPU's memory.

    Args:
        parameters: Number of parameters.
        image_bytes: Bytes of an image's activations.
        available_gib: The GPU's memory.
    """
    states = state_bytes(recipe, parameters, world_size, zero_stage, offload)
    fixed, crops = loader_bytes(recipe.data, 0), recipe.data.crops_per_image
    per_image = image_bytes + (loader_bytes(recipe.data, crops) - fixed) / crops
    free = (available_gib - OVERHEAD_GIB) * GIB - states - fixed
    activations, loader = micro_batch * image_bytes, loader_bytes(recipe.data, micro_batch)
    _, gradients, optimizer = (parameters * size for size in bytes_per_parameter(recipe))
    return Memory(
        zero_stage=zero_stage,
        offload="optimizer" if offload else "none",
        states=states / GIB,
        activations=activations / GIB,
        loader=loader / GIB,
        total=(states + activations + loader) / GIB + OVERHEAD_GIB,
        largest_micro_batch=max(0, int(free // per_image)),
        host=(optimizer + gradients) / world_size / GIB if offload else 0.0,
    )


def state_bytes(recipe: TrainingRecipe, parameters: int, world_size: int, zero_stage: int, offload: bool) -> float:
    """Return the bytes of weights, gradients and optimizer state on each GPU.

    ZeRO 1 shards the optimizer state, 2 also the gradients, 3 also the weights.
    """
    weights, gradients, optimizer = (parameters * size for size in bytes_per_parameter(recipe))
    # In bf16, ZeRO 1 keeps the last micro batch's gradients besides their sums (BF16_Optimizer's clear_lp_grads=False).
    micro_gradients = 2 * parameters if recipe.engine.precision == "bf16" else 0
    return (
        weights / (world_size if zero_stage >= 3 else 1)
        # With offload, ZeRO 3 sums gradients in host memory, ZeRO 2 still on the GPU.
        + (0 if offload and zero_stage == 3 else gradients / (world_size if zero_stage >= 2 else 1))
        + (0 if offload else optimizer / (world_size if zero_stage >= 1 else 1))
        + (micro_gradients if zero_stage == 1 else 0)
    )


def bytes_per_parameter(recipe: TrainingRecipe) -> tuple[int, int, int]:
    """Return the bytes per parameter of weights, gradients and optimizer state, with the EMA.

    In 16 bits the optimizer has its own fp32 weights, and gradients are summed in fp32 (engine_config.py).
    """
    ema = 0 if recipe.train.ema_decay is None else 4
    return (4, 4, 8 + ema) if recipe.engine.precision == "fp32" else (2, 4, 12 + ema)


def loader_bytes(data: DataSection, micro_batch: int) -> int:
    """Return the loader's memory on the GPU: the decoder's, and the pixels of the micro batch that is loaded ahead."""
    ahead = 4 * 3 * data.image_size**2 * micro_batch
    return decoder_memory(data, micro_batch, data.decode_threads or LOADER_THREADS).device + ahead


def micro_batch_limits(
    recipe: TrainingRecipe, parameters: int, image_bytes: int, image_flops: float, world_size: int, available_gib: float
) -> MicroBatchLimits:
    """Return the limits of `engine.micro_batch: auto` with the recipe's ZeRO stage.

    Args:
        image_flops: FLOPs of an image's training step.
    """
    engine = recipe.engine
    memory = estimate_memory(
        recipe,
        parameters,
        image_bytes,
        world_size,
        available_gib - RESERVE_GIB,
        micro_batch=1,
        zero_stage=engine.zero_stage,
        offload=engine.offload != "none",
    )
    return MicroBatchLimits(memory.largest_micro_batch, int(MAX_TFLOP * 1e12 // image_flops))
