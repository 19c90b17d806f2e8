"""The rank processes of checks 6 and 7: small engines of every ZeRO stage, one after another.

ZeRO 3 comes last, because its engine replaces the linear layer of all modules that are built later.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import all_gather_object, destroy_process_group
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.gpu_check.check import Context
from pipeline.methods import build_method
from pipeline.recipe import Recipe
from pipeline.train import engine
from pipeline.train.engine_config import ADAM_EPS, engine_config
from pipeline.train.guard import Guard
from pipeline.train.sharded_state import iter_flat_partitions

RANK_BATCH = 4
LR, SKIP_LR = 1e-3, 1e-4
"""Learning rates: large enough to show a wrong update, and small enough that no good step looks like a spike."""
BAD_LOSSES = {"NaN loss": float("nan"), "loss spike": 100.0}
"""What multiplies the loss. DeepSpeed itself skips NaNs at some stages, spikes never."""

ShouldSkip = Callable[[Guard, float | torch.Tensor], torch.Tensor]
"""(guard, gradient norm) -> 1.0 if the step is skipped, else 0.0; 0-d."""


def train_on_stages(
    context: dict[str, Any], precisions: list[str], stages: list[tuple[int, str]], steps: int
) -> dict[str, list[float]]:
    """Train a small MAE with each precision and stage. Returns the losses, and those of plain PyTorch in fp32."""
    scope = Context(**context)
    dist_info = init_dist_env()
    # First: an engine of ZeRO 3 would change it.
    losses = {"PyTorch": _pytorch_losses(_recipe(scope, 0, "none", "fp32", 1), dist_info.device, steps)}
    engine.init_distributed(10.0, with_watchdog=False)
    for precision in precisions:
        for stage, offload in stages:
            recipe = _recipe(scope, stage, offload, precision, dist_info.world_size)
            losses[f"{precision}, ZeRO {stage}{', offload' * (offload != 'none')}"] = _engine_losses(
                recipe, dist_info, steps
            )
    destroy_process_group()
    return losses


def skip_on_stages(
    context: dict[str, Any], precision: str, stages: list[tuple[int, str]], should_skip: ShouldSkip = Guard.should_skip
) -> dict[str, str]:
    """Train a step with a NaN loss and one with a loss spike on each stage.

    Args:
        should_skip: What decides about a step; the guard's, which training uses.

    Returns:
        What is wrong on each stage, on any rank; empty if nothing is.
    """
    scope = Context(**context)
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    problems = {}
    for stage, offload in stages:
        recipe = _recipe(scope, stage, offload, precision, dist_info.world_size)
        local = _skip_problem(recipe, dist_info, should_skip)
        name = f"ZeRO {stage}{', offload' * (offload != 'none')}"
        problems[name] = next(filter(None, all_gather_object(local)), "")
    destroy_process_group()
    return problems


def _recipe(scope: Context, stage: int, offload: str, precision: str, ranks: int) -> Recipe:
    return scope.recipe(
        "vitb16_mae",
        "model.depth=2",
        "model.decoder_depth=1",
        f"engine.zero_stage={stage}",
        f"engine.offload={offload}",
        f"engine.precision={precision}",
        "guard.window=8",
        f"data.global_batch={RANK_BATCH * scope.gpus}",  # the same on one rank and on several
        f"engine.micro_batch={RANK_BATCH * scope.gpus // ranks}",
    )


def _make_batch(recipe: Recipe, noise_size: int, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    batch, size = recipe.data.global_batch, recipe.data.image_size
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(device), torch.rand(batch, noise_size, generator=generator).to(device)


def _pytorch_losses(recipe: Recipe, device: torch.device, steps: int) -> list[float]:
    torch.manual_seed(0)
    method = build_method(recipe).to(device)
    groups = method.parameter_groups(recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=recipe.optim.betas, eps=ADAM_EPS)
    losses = []
    for step in range(steps):
        loss = method(*_make_batch(recipe, method.noise_size, step, device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _build(recipe: Recipe, dist_info: DistInfo) -> Any:
    torch.manual_seed(0)
    method = build_method(recipe)
    return engine.build_engine(recipe, method, engine_config(recipe, dist_info.world_size), dist_info.device)


def _local_batch(model: Any, recipe: Recipe, step: int, dist_info: DistInfo) -> list[torch.Tensor]:
    batch = _make_batch(recipe, model.module.noise_size, step, dist_info.device)
    return [values.tensor_split(dist_info.world_size)[dist_info.rank] for values in batch]


def _engine_losses(recipe: Recipe, dist_info: DistInfo, steps: int) -> list[float]:
    model = _build(recipe, dist_info)
    never = torch.zeros((), device=dist_info.device)
    losses = []
    for step in range(steps):
        engine.set_learning_rate(model, LR)
        loss = model(*_local_batch(model, recipe, step, dist_info)).loss
        model.backward(loss)
        engine.step(model, lambda norm: never)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist_info.world_size)
    return losses


def _skip_problem(recipe: Recipe, dist_info: DistInfo, should_skip: ShouldSkip) -> str:
    """Train good steps, bad ones, and a good one. Returns what is wrong with the state."""
    model = _build(recipe, dist_info)
    guard = Guard(recipe.guard, recipe.engine.precision, dist_info.device)

    def train(step: int, factor: float) -> None:
        engine.set_learning_rate(model, SKIP_LR)
        loss = model(*_local_batch(model, recipe, step, dist_info)).loss * factor
        model.backward(loss)
        guard.observe_loss(loss)
        guard.record_step(step, engine.step(model, lambda norm: should_skip(guard, norm)))

    steps = itertools.count(1)
    for _ in range(recipe.guard.window):
        train(next(steps), 1.0)
    before = _copy_state(model)
    for name, factor in BAD_LOSSES.items():
        train(next(steps), factor)
        changed = [key for key, value in _copy_state(model).items() if not torch.equal(value, before[key])]
        if changed:
            return f"the step with a {name} changed {len(changed)} of {len(before)} tensors"
    train(next(steps), 1.0)
    after = _copy_state(model)
    if all(torch.equal(value, before[name]) for name, value in after.items()):
        return "the good step after them changed nothing"
    return "" if all(torch.isfinite(value).all() for value in after.values()) else "the state is not finite"


def _copy_state(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of this rank's weights in training precision, fp32 weights and optimizer state."""
    # With ZeRO 3 a parameter is empty outside of its module; its partition is in ds_tensor.
    state = {f"weight {name}": getattr(p, "ds_tensor", p) for name, p in model.module.named_parameters()}
    for number, partition in enumerate(iter_flat_partitions(model)):
        state[f"fp32 {number}"] = partition.tensor
        optimizer_state = model.basic_optimizer.state.get(partition.tensor, {})
        state |= {f"{name} {number}": value for name, value in optimizer_state.items() if torch.is_tensor(value)}
    return {name: value.detach().clone() for name, value in state.items()}
