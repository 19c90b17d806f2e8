"""The DeepSpeed engine: the only file that imports deepspeed.

Invariant: a step that the guard's verdict is against leaves weights and moments as they are, whichever the
optimiser and the ZeRO stage.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from pipeline.errors import Diverged, StoppedEarly, UserError
from pipeline.io.tensors import save_tensors
from pipeline.models.learner import TrainableModule
from pipeline.recipe.base import TrainingRecipe
from pipeline.train import sharded_state
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import ADAM_EPS
from pipeline.train.watchdog import EXTENDED_FACTOR

with redirect_stdout(sys.stderr):  # what it logs, now and later: stdout is for results
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    # To check the optimiser's type DeepSpeed imports its Muon, which loads torch's compiler unless that is
    # disabled. It would take longer than the import of DeepSpeed itself.
    _dynamo_disable = os.environ.get("TORCHDYNAMO_DISABLE", "")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import deepspeed.runtime.zero.muon.muon_optimizer

    os.environ["TORCHDYNAMO_DISABLE"] = _dynamo_disable

# On a CPU, DeepSpeed would compile a shared-memory all-reduce, for a minute, that only its inference uses.
deepspeed.ops.__compatible_ops__ = {}

Engine = deepspeed.DeepSpeedEngine
WEIGHTS, WEIGHTS_EMA = "weights.safetensors", "weights_ema.safetensors"
ENGINE_STATE = "engine.json"
SLOW_CONNECT_S = 30.0  # seconds that the ranks may take to find each other without a word


def init_distributed(timeout_minutes: float, watched: bool = True) -> None:
    """Join the other ranks. `distributed.find_world` has prepared the environment. StoppedEarly where they
    cannot meet.

    The ranks wait `timeout_minutes` for each other, here and in collectives. Where they are watched, longer:
    the watchdog is to end a rank, and say where it hung.
    """
    logger.setLevel(logging.WARNING)
    timeout = timedelta(
        minutes=max(10.0, 2 * EXTENDED_FACTOR * timeout_minutes) if watched else timeout_minutes
    )
    waiting = threading.Timer(SLOW_CONNECT_S, _warn_connecting)
    waiting.daemon = True
    waiting.start()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except dist.DistError as error:
        where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        why = str(error).splitlines()[0].rstrip(".")
        raise StoppedEarly(
            f"the ranks cannot meet at {where}: {why}. If another run has the port, "
            "give this one its own: deepspeed --master_port N, or MASTER_PORT=N"
        ) from error
    finally:
        waiting.cancel()


def check_config(config: dict) -> None:
    """UserError where DeepSpeed does not take a value of the configuration."""
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, got {first['input']!r}"
    except ValueError as error:
        wrong = str(error)
    else:
        return
    raise UserError(f"--deepspeed_config: DeepSpeed does not take a value in it: {wrong}")


def build_engine(
    recipe: TrainingRecipe, learner: TrainableModule, config: dict, device: torch.device
) -> Engine:
    """Wrap the learner. config: of `engine_config`."""
    engine, *_ = deepspeed.initialize(
        model=learner.to(device),
        optimizer=_optimizer(recipe, learner),
        config=config,
        dist_init_required=False,
    )
    if recipe.engine.compile:
        engine.compile()
    return engine


def _warn_connecting() -> None:
    if os.environ["RANK"] == "0":
        where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        print(f"still connecting at {where}: not all ranks have come", file=sys.stderr, flush=True)


def _optimizer(recipe: TrainingRecipe, learner: TrainableModule) -> torch.optim.AdamW:
    """On the learner's parameter groups."""
    groups = learner.parameter_groups(recipe.optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, eps=ADAM_EPS, fused=True)


def set_learning_rate(engine: Engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def is_gradient_accumulation_boundary(engine: Engine) -> bool:
    """Whether the micro batch at work is a global batch's last."""
    return engine.is_gradient_accumulation_boundary()


def step(engine: Engine, should_skip: Callable[[float | torch.Tensor], torch.Tensor]) -> float | torch.Tensor:
    """Count a micro batch; after a global batch's last, update the weights. Returns the gradient's norm, 0.0
    before the last.

    `verdict` is asked with that norm once it is known, before any weight is touched; where it is 1.0 weights
    and moments stay as they are. The host does not wait for the verdict, unless the optimiser works on the
    CPU; for the norm DeepSpeed itself has it wait at most stages (docs/engine.md). There
    DeepSpeed leaves a step out, too, where the gradient is not finite, and then says that its norm is
    infinite.
    """
    if not is_gradient_accumulation_boundary(engine):
        engine.step()
        return 0.0
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Without ZeRO and in fp32 DeepSpeed keeps no norm.
        norm = nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)

    def judged() -> torch.Tensor:
        return should_skip(engine.optimizer._global_grad_norm if norm is None else norm)

    try:
        with skip_step_if(engine.basic_optimizer, judged):
            engine.step()
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise Diverged(
                "fp16: the gradient overflows at the smallest loss scale there is. Look at engine.precision "
                "(bf16 and fp32 have no loss scale), and the learning rate (optim.base_lr, optim.clip_grad)"
            ) from None
        raise
    if getattr(engine.optimizer, "cpu_offload", False) and engine.optimizer.overflow:
        # DeepSpeed 0.19 would go on adding to the sum that overflowed.
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
    return engine.get_global_grad_norm() if norm is None else norm


@contextmanager
def skip_step_if(optimizer: torch.optim.AdamW, should_skip: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Let the optimiser leave its steps out where the verdict is 1.0: it reads found_inf where its parameters
    are."""

    def ask(*_: object) -> None:
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = should_skip().to(device)  # torch's own copy to a CPU would not wait for it

    asking = optimizer.register_step_pre_hook(ask)
    try:
        yield
    finally:
        asking.remove()


def save(engine: Engine, model_ema: ModelEma | None, path: Path) -> None:
    """Write this rank's part of weights and optimiser state into the folder `path`; every rank calls it."""
    sharded_state.save(engine, path / _rank_file(dist.get_rank()), model_ema.tensors if model_ema else [])


def consolidate_fp32_weights(engine: Engine, model_ema: ModelEma | None, path: Path) -> None:
    """Add what one rank alone writes, when all have saved: the numbers, and the weights in fp32."""
    writers = dist.get_world_size() if engine.zero_optimization_stage() else 1
    numbers = {**sharded_state.scalar_state(engine), "writers": writers}
    (path / ENGINE_STATE).write_text(json.dumps(numbers, indent=1))
    saved = sharded_state.SavedState([path / _rank_file(writer) for writer in range(writers)])
    shapes = {key: getattr(p, "ds_shape", p.shape) for key, p in engine.module.named_parameters()}
    files = {WEIGHTS: sharded_state.WEIGHT} | ({WEIGHTS_EMA: sharded_state.EMA} if model_ema else {})
    for file, kind in files.items():
        save_tensors(
            {key: saved.read_all(key, kind).view(shape) for key, shape in shapes.items()}, path / file
        )


def load(engine: Engine, model_ema: ModelEma | None, directory: Path, name: str) -> None:
    """Read what was saved by whatever number of ranks, at whatever ZeRO stage, with whatever micro batch.

    Every rank must call it.
    """
    path = directory / name
    numbers = json.loads((path / ENGINE_STATE).read_text())
    parts = [path / _rank_file(writer) for writer in range(numbers["writers"])]
    sharded_state.load(engine, parts, numbers, model_ema.tensors if model_ema else [])


def check_precision(recipe: TrainingRecipe) -> None:
    """UserError where the device can't compute in the recipe's precision."""
    accelerator = get_accelerator()
    able = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    precision = recipe.engine.precision
    if precision in able and not able[precision]():
        raise UserError(f"engine.precision: this {accelerator.device_name()} can't compute in {precision}")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
