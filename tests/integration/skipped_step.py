"""Skip steps on real engines, and see that nothing moved and that no step asked for a wait.

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


def tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a state, copied."""
    if isinstance(tree, torch.Tensor):
        return {path: tree.detach().clone()}
    items = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list | tuple):
        items = enumerate(tree)
    return {k: v for key, value in items for k, v in tensors(value, f"{path}.{key}").items()}


def everything(model, model_ema) -> dict[str, torch.Tensor]:
    """The weights in use, the masters, the moments, the step counters and the weights' average."""
    return tensors(
        {
            # With ZeRO-3 a parameter is the rank's share of it; the whole is there only now and then.
            "weights": {name: getattr(p, "ds_tensor", p) for name, p in model.module.named_parameters()},
            "optimizer": model.optimizer.state_dict(),
            "base": list(model.basic_optimizer.state.values()),
            "average": model_ema.tensors,
        }
    )


def train(model, model_ema, method, guard, step, factor=1.0, broken=False):
    """One step; `broken`: one weight's gradient is not finite. Returns whether it was skipped."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    engine.set_learning_rate(model, 1e-3)
    loss = model(images, torch.rand(4, method.noise_size, generator=generator)).loss * factor
    if broken:
        loss.register_hook(lambda gradient: gradient * float("nan"))
    model.backward(loss)
    guard.observe_loss(loss)
    norm = engine.step(model, guard.should_skip)
    skipped = guard.close(step, norm)
    model_ema.update(skipped)
    return bool(skipped)


def waits() -> list[None]:
    """Grows with every call by which DeepSpeed has the host wait for all that the device has to do."""
    accelerator, calls = get_accelerator(), []
    synchronize = accelerator.synchronize

    def counted(*arguments) -> None:
        calls.append(None)
        synchronize(*arguments)

    accelerator.synchronize = counted
    return calls


def check(stage: int, precision: str, clip: float | None, world, **more) -> None:
    settings = {
        **SMALL,
        "engine.zero_stage": stage,
        "engine.precision": precision,
        "data.global_batch": 4 * world.size,
        "guard.window": 8,
        "optim.clip_grad": "null" if clip is None else clip,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(0)
    method = build_method(recipe)
    model = engine.build_engine(recipe, method, engine_config(recipe, world.size), world.device)
    model_ema = ModelEma(model, 0.9)
    guard = Guard(recipe.guard, precision, world.device, None)
    step = 0
    for _ in range(40):  # fp16's loss scale comes down first
        step += 1
        good = not train(model, model_ema, method, guard, step)
        if good and torch.isfinite(guard._losses).all():
            break
    for fault in ({"factor": 50.0}, {"factor": float("nan")}, {"broken": True}):
        before = everything(model, model_ema)
        step += 1
        assert train(model, model_ema, method, guard, step, **fault), (stage, precision, clip, fault)
        after = everything(model, model_ema)
        assert before.keys() == after.keys()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert not moved, (stage, precision, clip, fault, moved)
        while train(model, model_ema, method, guard, step := step + 1):
            assert precision == "fp16", (stage, clip, fault)
        assert any(
            not torch.equal(value, before[name]) for name, value in everything(model, model_ema).items()
        )
        assert all(torch.isfinite(value).all() for value in everything(model, model_ema).values())
    guard.read(step)
    reasons = {skip.reason for skip in guard.skips}
    print("zero", stage, precision, "clip", clip, *more.values(), len(before), "tensors;", sorted(reasons))


def main(precision: str) -> None:
    world = init_dist_env()
    engine.init_distributed(timeout_minutes=10)
    waited = waits()
    for stage in (0, 1, 2, 3):
        for clip in (None, 0.1):
            check(stage, precision, clip, world)
    for stage in (2, 3):
        check(stage, precision, 0.1, world, engine__offload="optimizer")
    assert not waited, len(waited)
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
