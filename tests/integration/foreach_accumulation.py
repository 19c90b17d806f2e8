"""Train with DeepSpeed's own accumulation and norm of bf16 gradients, and with ours: no bit differs.

`python -m foreach_accumulation`; fails by an assertion. Prints the operations of both.
"""

import deepspeed.runtime.bf16_optimizer as bf16_optimizer
import torch
from deepspeed.runtime.utils import get_global_norm_of_tensors
from runs import SMALL
from skipped_step import copy_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train import engine, foreach_gradients
from pipeline.train.engine_config import engine_config

STEPS, ACCUMULATION = 20, 2


class OperationCounter(TorchDispatchMode):
    """Counts torch's operations, without views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def train(clip: float | None, ours: bool, dist_info: DistInfo) -> tuple[list, dict[str, int]]:
    """Return loss, norm, weights and optimizer state after every step, and the operations of a step."""
    settings = {
        **SMALL,
        "engine.precision": "bf16",
        "engine.zero_stage": 1,
        "engine.micro_batch": 2,
        "data.global_batch": 2 * ACCUMULATION * dist_info.world_size,
        "optim.clip_grad": "null" if clip is None else clip,
    }
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(0)
    method = build_method(recipe)
    model = engine.build_engine(recipe, method, engine_config(recipe, dist_info.world_size), dist_info.device)
    norm = foreach_gradients.global_norm
    if not ours:
        del model.optimizer.update_hp_grads  # the class's own
        norm = get_global_norm_of_tensors
    add_gradients = model.optimizer.update_hp_grads
    counts = {"accumulation": 0, "norm": 0}

    def counting(name, function):
        def counted(*args, **kwargs):
            with OperationCounter() as counter:
                result = function(*args, **kwargs)
            counts[name] = counter.count
            return result

        return counted

    bf16_optimizer.get_global_norm_of_tensors = counting("norm", norm)
    model.optimizer.update_hp_grads = counting("accumulation", add_gradients)
    history = []
    for step in range(STEPS):
        engine.set_learning_rate(model, 1e-3)
        for micro in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist_info.rank)
            images = torch.randn(2, 3, 32, 32, generator=generator)
            loss = model(images, torch.rand(2, method.noise_size, generator=generator)).loss
            model.backward(loss)
            grad_norm = engine.step(model, lambda norm: torch.zeros(()))
        state = {"weights": method.state_dict(), "optimizer": list(model.basic_optimizer.state.values())}
        history.append(copy_tensors({"loss": loss, "norm": torch.as_tensor(grad_norm), **state}))
    return history, counts


def main() -> None:
    dist_info = init_dist_env()
    engine.init_distributed(timeout_minutes=10)
    for clip in (None, 0.1):
        (expected, before), (found, after) = (train(clip, ours, dist_info) for ours in (False, True))
        for step, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert one.keys() == other.keys() and len(one) > 20
            different = [name for name in one if not torch.equal(one[name], other[name])]
            assert not different, (clip, step, different)
        if dist_info.rank == 0:
            print(f"clip {clip}: equal;", *(f"{name} {before[name]} -> {after[name]}" for name in before))
    destroy_process_group()


if __name__ == "__main__":
    main()
