"""The DeepSpeed engine. The only module that imports deepspeed.

Invariant: a step that the guard skips leaves weights and optimizer state unchanged, for every optimizer and ZeRO stage.
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
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import safe_open
from timm.models.vision_transformer import Block
from torch import nn

from pipeline.errors import Diverged, StoppedEarly, UserError
from pipeline.io.tensors import save_tensors
from pipeline.models.trainable_module import TrainableModule
from pipeline.recipe.training import TrainingRecipe
from pipeline.train import foreach_gradients, sharded_state
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import ADAM_EPS
from pipeline.train.watchdog import EXTENDED_FACTOR


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Without a GPU DeepSpeed warns that it selects the CPU. To check the optimizer's type it imports Muon, and Muon imports
# torch's compiler unless that is disabled, which takes longer than the import of DeepSpeed itself. It logs to stdout,
# which is for results.
_accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
with redirect_stdout(sys.stderr), _environment(TORCHDYNAMO_DISABLE="1", **_accelerator):
    import deepspeed
    import deepspeed.runtime.bf16_optimizer
    import deepspeed.runtime.zero.muon.muon_optimizer
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger as deepspeed_logger

# On a CPU DeepSpeed would compile a shared-memory all_reduce for a minute, which only its inference uses.
setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (not declared in its type)
deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = foreach_gradients.global_norm

logger = logging.getLogger(__name__)
Engine = Any
"""deepspeed.DeepSpeedEngine, whose attributes depend on ZeRO stage and precision."""
DEEPSPEED = "0.19."
"""Supported versions: sharded_state.py depends on private attributes."""
WEIGHTS, WEIGHTS_EMA = "weights.safetensors", "weights_ema.safetensors"
ENGINE_STATE = "engine.json"
SLOW_CONNECT_S = 30.0


def init_distributed(timeout_minutes: float, with_watchdog: bool = True) -> None:
    """Connect the ranks. `launch.init_dist_env` has prepared the environment.

    Args:
        timeout_minutes: Timeout of the rendezvous and of collectives.
        with_watchdog: Use a longer timeout, so that the watchdog ends a hanging rank and reports where it hangs.

    Raises:
        StoppedEarly: If the ranks cannot connect.
    """
    check_version()
    deepspeed_logger.setLevel(logging.WARNING)
    minutes = max(10.0, 2 * EXTENDED_FACTOR * timeout_minutes) if with_watchdog else timeout_minutes
    warning = threading.Timer(SLOW_CONNECT_S, _warn_connecting)
    warning.daemon = True
    warning.start()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(minutes=minutes), verbose=False)
    except dist.DistError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise StoppedEarly(
            f"rendezvous failed at {_rendezvous()}: {why}. If the port is taken, choose another: "
            "deepspeed --master_port N, or MASTER_PORT=N"
        ) from error
    finally:
        warning.cancel()


def check_version(version: str = deepspeed.__version__) -> None:
    """Raise UserError if a version of DeepSpeed is not supported."""
    if not version.startswith(DEEPSPEED):
        raise UserError(f"deepspeed {version}: not supported; pip install 'deepspeed>=0.19,<0.20'")


def check_config(config: dict) -> None:
    """Raise UserError if DeepSpeed rejects a value of the configuration."""
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, got {first['input']!r}"
        raise UserError(f"--deepspeed_config: DeepSpeed rejects {wrong}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config: DeepSpeed rejects it: {error}") from error


def check_precision(recipe: TrainingRecipe) -> None:
    """Raise UserError if the device cannot compute in the recipe's precision."""
    accelerator: Any = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    precision = recipe.engine.precision
    if precision in supported and not supported[precision]():
        raise UserError(f"engine.precision: this {accelerator.device_name()} does not support {precision}; use fp32")


def build_engine(recipe: TrainingRecipe, module: TrainableModule, config: dict, device: torch.device) -> Engine:
    """Wrap a module in an engine with AdamW.

    Args:
        config: The result of `engine_config`.
    """
    optimizer = build_optimizer(recipe, module.to(device))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if isinstance(engine.optimizer, deepspeed.runtime.bf16_optimizer.BF16_Optimizer):
        foreach_gradients.use_foreach_accumulation(engine.optimizer)
    if recipe.engine.compile:
        # It warns about a CUDA toolkit on a machine without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        compile_blocks(module)
    return engine


def compile_blocks(module: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile each transformer block in place; blocks of the same shapes share one graph.

    Compiling the whole module would take a graph of all its blocks, and as many times as long.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(backend=backend, dynamic=False)


@contextmanager
def without_compilation(recipe: TrainingRecipe) -> Iterator[None]:
    """Run compiled blocks uncompiled inside the block: other batch sizes would compile them again."""
    if not recipe.engine.compile:  # torch.compiler takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def build_optimizer(recipe: TrainingRecipe, module: TrainableModule) -> torch.optim.AdamW:
    """Create AdamW with the module's parameter groups."""
    groups = module.parameter_groups(recipe.optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, eps=ADAM_EPS, fused=True)


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the learning rate, times "lr_scale" in parameter groups that have one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def is_gradient_accumulation_boundary(engine: Engine) -> bool:
    """Return whether the present micro batch is the last of a global batch."""
    return engine.is_gradient_accumulation_boundary()


def step(engine: Engine, should_skip: Callable[[float | torch.Tensor], torch.Tensor]) -> float | torch.Tensor:
    """Count a micro batch; after the last one of a global batch, update the weights.

    Args:
        should_skip: Called with the gradient norm before any weight changes. If it returns 1.0, weights and optimizer
            state stay unchanged. The host does not wait for the result, unless the optimizer runs on the CPU.

    Returns:
        The gradient norm; 0.0 before the last micro batch; infinite if DeepSpeed itself skipped the step, as it does
        at some stages if the gradient is not finite. docs/engine.md lists where DeepSpeed waits for the norm.
    """
    if not is_gradient_accumulation_boundary(engine):
        engine.step()
        return 0.0
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Without ZeRO and in fp32 DeepSpeed keeps no norm.
        norm = nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)

    def decide() -> torch.Tensor:
        return should_skip(engine.optimizer._global_grad_norm if norm is None else norm)

    try:
        with skip_step_if(engine.basic_optimizer, decide):
            engine.step()
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise Diverged(
                "fp16: the gradient overflows at the smallest loss scale; use engine.precision bf16 or fp32 or a "
                "smaller learning rate (optim.base_lr, optim.clip_grad)"
            ) from error
        raise
    if getattr(engine.optimizer, "cpu_offload", False) and engine.optimizer.overflow:
        # DeepSpeed 0.19 would add the next gradients to the sum that overflowed.
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
    return engine.get_global_grad_norm() if norm is None else norm


@contextmanager
def skip_step_if(optimizer: torch.optim.Optimizer, should_skip: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Make the optimizer skip its steps inside the block if `should_skip` returns 1.0.

    torch's fused AdamW reads `found_inf` on the device of its parameters.
    """

    def set_found_inf(*_: object) -> None:
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        # torch's own copy to a CPU would not wait for the value.
        setattr(optimizer, "found_inf", should_skip().to(device))  # noqa: B010 (not declared in its type)

    hook = optimizer.register_step_pre_hook(set_found_inf)
    try:
        yield
    finally:
        hook.remove()


def save(engine: Engine, model_ema: ModelEma | None, path: Path) -> None:
    """Write this rank's part of weights and optimizer state into the directory `path`. Every rank calls it."""
    sharded_state.save(engine, path / _rank_file(dist.get_rank()), model_ema.tensors if model_ema else [])


def consolidate_fp32_weights(engine: Engine, model_ema: ModelEma | None, path: Path) -> None:
    """Write the scalars and the whole fp32 weights from the parts of all ranks. Rank 0 calls it after `save`."""
    writers = dist.get_world_size() if engine.zero_optimization_stage() else 1
    scalars = {**sharded_state.scalar_state(engine), "writers": writers}
    (path / ENGINE_STATE).write_text(json.dumps(scalars, indent=1))
    saved = sharded_state.ShardedStateReader([path / _rank_file(writer) for writer in range(writers)])
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    files = {WEIGHTS: sharded_state.WEIGHT} | ({WEIGHTS_EMA: sharded_state.EMA} if model_ema else {})
    for file, kind in files.items():
        tensors = {name: saved.read_all(name, kind).view(shape) for name, shape in shapes.items()}
        save_tensors(tensors | _persistent_buffers(engine.module), path / file)


def load(engine: Engine, model_ema: ModelEma | None, checkpoint: Path) -> None:
    """Restore what any world size and ZeRO stage saved. Every rank calls it."""
    scalars = json.loads((checkpoint / ENGINE_STATE).read_text())
    parts = [checkpoint / _rank_file(writer) for writer in range(scalars["writers"])]
    sharded_state.load(engine, parts, scalars, model_ema.tensors if model_ema else [])
    if buffers := _persistent_buffers(engine.module):
        with safe_open(checkpoint / WEIGHTS, framework="pt") as saved:
            for name, buffer in buffers.items():
                buffer.copy_(saved.get_tensor(name))


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state that is not trained, such as running statistics; equal on all ranks."""
    trained = {name for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in trained}


def _warn_connecting() -> None:
    logger.warning(f"still connecting at {_rendezvous()}: waiting for all ranks to join")


def _rendezvous() -> str:
    return "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
