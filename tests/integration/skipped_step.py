"""Skip steps on real engines; check that no state changes and that DeepSpeed does not synchronize with the device.

`python -m skipped_step PRECISION`; fails by an assertion.
"""

import sys

import torch
from deepspeed.accelerator import get_accelerator
from runs import SMALL

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import init_dist_env
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train import engine
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import engine_config
from pipeline.train.guard import Guard


def copy_tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """Return copies of all tensors in a state, by path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree.detach().clone()}
    items = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list | tuple):
        items = enumerate(tree)
    return {k: v for key, value in items for k, v in copy_tensors(value, f"{path}.{key}").items()}


def full_state(model, model_ema) -> dict[str, torch.Tensor]:
    """Return copies of the model's weights, the fp32 weights, the optimizer state and the EMA."""
    return copy_tensors(
        {
            # With ZeRO-3 a parameter is empty outside of its module; its partition is in ds_tensor.
            "weights": {name: getattr(p, "ds_tensor", p) for name, p in model.module.named_parameters()},
            "optimizer": model.optimizer.state_dict(),
            "base": list(model.basic_optimizer.state.values()),
            "ema": model_ema.tensors,
        }
    )


def train(model, model_ema, method, guard, step, factor=1.0, broken=False):
    """Train one step. Returns whether it was skipped.

    Args:
        factor: Multiplies the loss.
        broken: Make one gradient NaN.
    """
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    engine.set_learning_rate(model, 1e-3)
    loss = model(images, torch.rand(4, method.noise_size, generator=generator)).loss * factor
    if broken:
        loss.register_hook(lambda gradient: gradient * float("nan"))
    model.backward(loss)
    guard.observe_loss(loss)
    grad_norm = engine.step(model, guard.should_skip)
    skipped = guard.record_step(step, grad_norm)
    model_ema.update(skipped)
    return bool(skipped)


def record_synchronizations() -> list[None]:
    """Return a list that grows with every call by which DeepSpeed makes the host wait for the device."""
    accelerator, calls = get_accelerator(), []
    synchronize = accelerator.synchronize

    def recording_synchronize(*arguments) -> None:
        calls.append(None)
        synchronize(*arguments)

    accelerator.synchronize = recording_synchronize
    return calls


def check(stage: int, precision: str, clip: float | None, dist_info, **more) -> None:
    settings = {
        **SMALL,
        "engine.zero_stage": stage,
        "engine.precision": precision,
        "data.global_batch": 4 * dist_info.world_size,
        "guard.window": 8,
        "optim.clip_grad": "null" if clip is None else clip,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(0)
    method = build_method(recipe)
    config = engine_config(recipe, dist_info.world_size)
    model = engine.build_engine(recipe, method, config, dist_info.device)
    model_ema = ModelEma(model, 0.9)
    guard = Guard(recipe.guard, precision, dist_info.device)
    step = 0
    for _ in range(40):  # in fp16 the loss scale is reduced first
        step += 1
        trained = not train(model, model_ema, method, guard, step)
        if trained and torch.isfinite(guard._losses).all():
            break
    for fault in ({"factor": 50.0}, {"factor": float("nan")}, {"broken": True}):
        before = full_state(model, model_ema)
        step += 1
        assert train(model, model_ema, method, guard, step, **fault), (stage, precision, clip, fault)
        after = full_state(model, model_ema)
        assert before.keys() == after.keys()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not changed, (stage, precision, clip, fault, changed)
        while train(model, model_ema, method, guard, step := step + 1):
            assert precision == "fp16", (stage, clip, fault)
        state = full_state(model, model_ema)
        assert any(not torch.equal(value, before[name]) for name, value in state.items())
        assert all(torch.isfinite(value).all() for value in state.values())
    guard.check(step)
    reasons = {skipped.reason for skipped in guard.skipped_steps}
    print("zero", stage, precision, "clip", clip, *more.values(), len(before), "tensors;", sorted(reasons))


def main(precision: str) -> None:
    dist_info = init_dist_env()
    engine.init_distributed(timeout_minutes=10)
    synchronizations = record_synchronizations()
    for stage in (0, 1, 2, 3):
        for clip in (None, 0.1):
            check(stage, precision, clip, dist_info)
    for stage in (2, 3):
        check(stage, precision, 0.1, dist_info, engine__offload="optimizer")
    assert not synchronizations, len(synchronizations)
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
