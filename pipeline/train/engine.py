"""The DeepSpeed engine: the only file that imports deepspeed.

Invariant: the recipe decides what is computed (batch, precision, optimiser, clipping), ds_configs/ only how
the engine does it. What both set is an error, so neither can silently win.
"""

import contextlib
import io
import json
import logging
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.train.distributed import World

Engine = deepspeed.DeepSpeedEngine
TIMEOUT = timedelta(minutes=10)
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


def engine_config(recipe: Recipe, world_size: int) -> dict:
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
    return config


def connect() -> None:
    """Join the other ranks. `distributed.find_world` has prepared the environment."""
    logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=TIMEOUT, verbose=False)


def build_engine(recipe: Recipe, method: nn.Module, world: World) -> Engine:
    """Wrap the method. AdamW without weight decay on biases and norms, as in the official MAE code."""
    decayed = [p for p in method.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in method.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=recipe.optim.betas,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=method.to(world.device),
        optimizer=optimizer,
        config=engine_config(recipe, world.size),
        dist_init_required=False,
    )
    if recipe.engine.compile:
        engine.compile()
    return engine


def set_learning_rate(engine: Engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def step(engine: Engine) -> float | torch.Tensor | None:
    """Count a micro batch; after a global batch's last, update the weights and return the gradient's norm."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Without ZeRO and in fp32 DeepSpeed keeps no norm.
        norm = nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


def save(engine: Engine, directory: Path, name: str) -> None:
    """Write model and optimiser under directory/name. Every rank must call it."""
    engine.save_checkpoint(str(directory), tag=name, save_latest=False)


def load(engine: Engine, directory: Path, name: str) -> None:
    """Read what `save` wrote, by the same number of ranks at the same ZeRO stage. Every rank must call it."""
    path, _ = engine.load_checkpoint(str(directory), tag=name)
    if path is None:
        raise UserError(f"{directory / name}: DeepSpeed found nothing to load there")


def fp32_weights(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The full-precision weights in a checkpoint, on the CPU, whatever the ZeRO stage and number of ranks."""
    if zero_stage:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's chatter
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return {name: tensor.float() for name, tensor in saved["module"].items()}


def disconnect() -> None:
    dist.destroy_process_group()


def _config_directory() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"
