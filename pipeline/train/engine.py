"""The DeepSpeed engine: the only file that imports deepspeed.

Invariant: the recipe decides what is computed (batch, precision, optimiser, clipping), ds_configs/ only how
the engine does it. What both set is an error, so neither can silently win.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import Diverged, UserError
from pipeline.learner import Learner
from pipeline.train import elastic
from pipeline.train.distributed import World
from pipeline.training_recipe import TrainingRecipe

Engine = deepspeed.DeepSpeedEngine
WEIGHTS = "weights.safetensors"
NUMBERS = "engine.json"
OF_THE_RECIPE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
}


def engine_config(recipe: TrainingRecipe, world_size: int) -> dict:
    """DeepSpeed's configuration: ds_configs/zero<stage>.json and what the recipe decides."""
    path = _config_directory() / f"zero{recipe.engine.zero_stage}.json"
    config = json.loads(path.read_text())
    for key in OF_THE_RECIPE.keys() & config.keys():
        raise UserError(
            f"{path}: {key} is set by the recipe, as {OF_THE_RECIPE[key]}; take it out of this file"
        )
    config |= {
        "train_batch_size": recipe.data.global_batch,
        "train_micro_batch_size_per_gpu": recipe.engine.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation(world_size),
        "gradient_clipping": recipe.optim.clip_grad or 0.0,
        "steps_per_print": None,
    }
    if recipe.engine.precision != "fp32":
        config[recipe.engine.precision] = {"enabled": True}
        if recipe.engine.zero_stage == 0:
            # Without ZeRO DeepSpeed adds up 16-bit gradients in 16 bits only.
            config.pop("data_types", None)
    return config


def connect(timeout_minutes: float) -> None:
    """Join the other ranks. `distributed.find_world` has prepared the environment.

    Collectives wait longer than `timeout_minutes`: the watchdog is to end a rank, and say where it hung.
    """
    logger.setLevel(logging.WARNING)
    if get_accelerator().device_name() == "cpu" and os.environ["RANK"] == "0":
        print("connecting; DeepSpeed's CPU operations are compiled once, for about a minute", file=sys.stderr)
    timeout = timedelta(minutes=max(10.0, 2 * timeout_minutes))
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if get_accelerator().device_name() == "cpu":
        dist.barrier()  # now every rank has opened every other's buffer, and the names are not needed
        name = "deepspeed_allreduce_buffer_{}_{MASTER_ADDR}_{MASTER_PORT}_{RANK}".format(
            os.getuid(), **os.environ
        )
        # DeepSpeed leaves them, 66 MiB of memory a rank and run, for as long as the machine is up.
        Path("/dev/shm", name).unlink(missing_ok=True)


def build_engine(recipe: TrainingRecipe, learner: Learner, world: World) -> Engine:
    """Wrap the learner; AdamW on its parameter groups."""
    optimizer = torch.optim.AdamW(
        learner.parameter_groups(recipe.optim.weight_decay), lr=0.0, betas=recipe.optim.betas, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=learner.to(world.device),
        optimizer=optimizer,
        config=engine_config(recipe, world.size),
        dist_init_required=False,
    )
    if recipe.engine.compile:
        engine.compile()
    return engine


def set_learning_rate(engine: Engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def at_boundary(engine: Engine) -> bool:
    """Whether the micro batch at work is a global batch's last."""
    return engine.is_gradient_accumulation_boundary()


def step(engine: Engine, verdict: Callable[[float | torch.Tensor], torch.Tensor]) -> float | torch.Tensor:
    """Count a micro batch; after a global batch's last, update the weights. Returns the gradient's norm, 0.0
    before the last.

    `verdict` is asked with that norm once it is known, before any weight is touched; where it is 1.0 weights
    and moments stay as they are. The host does not look at it. DeepSpeed itself leaves a step out, too, where
    the gradient is not finite, and then says that its norm is infinite.
    """
    if not at_boundary(engine):
        engine.step()
        return 0.0
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Without ZeRO and in fp32 DeepSpeed keeps no norm.
        norm = nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)

    def ask(optimizer: torch.optim.Optimizer, *_: object) -> None:
        optimizer.found_inf = verdict(engine.optimizer._global_grad_norm if norm is None else norm)

    asking = engine.basic_optimizer.register_step_pre_hook(ask)
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise Diverged(
                "fp16: the gradient overflows at the smallest loss scale there is. Look at engine.precision "
                "(bf16 and fp32 have no loss scale), and the learning rate (optim.base_lr, optim.clip_grad)"
            ) from None
        raise
    finally:
        asking.remove()
    return engine.get_global_grad_norm() if norm is None else norm


def save(engine: Engine, path: Path) -> None:
    """Write this rank's part of weights and optimiser state into the folder `path`; every rank calls it."""
    elastic.save(engine, path / _part(dist.get_rank()))


def complete(engine: Engine, path: Path) -> None:
    """Add what one rank alone writes, when all have saved: the numbers, and the weights in fp32."""
    writers = dist.get_world_size() if engine.zero_optimization_stage() else 1
    numbers = {**elastic.numbers(engine), "writers": writers}
    (path / NUMBERS).write_text(json.dumps(numbers, indent=1))
    saved = elastic.Saved([path / _part(writer) for writer in range(writers)])
    shapes = {key: getattr(p, "ds_shape", p.shape) for key, p in engine.module.named_parameters()}
    save_file({key: saved.whole(key).view(shape) for key, shape in shapes.items()}, path / WEIGHTS)


def load(engine: Engine, directory: Path, name: str) -> None:
    """Read what was saved by whatever number of ranks, at whatever ZeRO stage, with whatever micro batch.

    Every rank must call it.
    """
    path = directory / name
    numbers = json.loads((path / NUMBERS).read_text())
    elastic.load(engine, [path / _part(writer) for writer in range(numbers["writers"])], numbers)


def check_precision(recipe: TrainingRecipe) -> None:
    """UserError where the device can't compute in the recipe's precision."""
    accelerator = get_accelerator()
    able = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    precision = recipe.engine.precision
    if precision in able and not able[precision]():
        raise UserError(f"engine.precision: this {accelerator.device_name()} can't compute in {precision}")


def disconnect() -> None:
    dist.destroy_process_group()


def _part(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _config_directory() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"
