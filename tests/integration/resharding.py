"""Save engines of every kind, load them into engines of other kinds, and check that no bit of the state changes.

`python -m resharding [all]` loads each kind into itself and the next kind, or into all. Fails by an assertion.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from runs import SMALL
from safetensors import safe_open
from safetensors.torch import load_file
from skipped_step import train

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import init_dist_env
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train import engine
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import engine_config
from pipeline.train.guard import Guard

DECAY = 0.9
KINDS = [{"zero_stage": stage} for stage in range(4)]
KINDS += [{"zero_stage": stage, "offload": "optimizer"} for stage in (2, 3)]


def build(dist_info, precision="fp32", **kind):
    settings = {
        **SMALL,
        **{f"engine.{key}": value for key, value in kind.items()},
        "engine.precision": precision,
        "data.global_batch": 4 * dist_info.world_size,
    }
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(0)
    method = build_method(recipe)
    config = engine_config(recipe, dist_info.world_size)
    model = engine.build_engine(recipe, method, config, dist_info.device)
    return model, ModelEma(model, DECAY), method, Guard(recipe.guard, precision, dist_info.device)


def write(model, model_ema, directory: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint. Returns its whole tensors by "kind:parameter", whichever rank wrote which part."""
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    engine.save(model, model_ema, directory)
    dist.barrier()
    if dist.get_rank() == 0:
        engine.consolidate_fp32_weights(model, model_ema, directory)
    dist.barrier()
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(directory.glob("rank-*")):
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["ranges"])
        for key, values in load_file(path).items():
            parts.setdefault(key, []).append((ranges[key.partition(":")[2]][0], values))
    return {key: torch.cat([v for _, v in sorted(p, key=lambda part: part[0])]) for key, p in parts.items()}


def check_ema(dist_info) -> None:
    """Check the EMA against its definition; a skipped step leaves it unchanged."""
    model, model_ema, method, guard = build(dist_info, zero_stage=0)
    expected = {name: p.detach().clone() for name, p in method.named_parameters()}
    for step in range(1, 6):
        assert train(model, model_ema, method, guard, step, broken=step == 3) == (step == 3)
        if step != 3:
            for name, p in method.named_parameters():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * p.detach()
    saved = write(model, model_ema, Path(tempfile.mkdtemp()) / "ema")
    for name, values in expected.items():
        torch.testing.assert_close(saved[f"ema:{name}"], values.flatten(), rtol=1e-6, atol=1e-7)
    print("EMA as defined")


def main() -> None:
    dist_info = init_dist_env()
    engine.init_distributed(timeout_minutes=10)
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    directory = Path(box[0])
    if dist_info.world_size == 1:
        check_ema(dist_info)
    for number, source in enumerate(KINDS):
        model, model_ema, method, guard = build(dist_info, **source)
        for step in (1, 2, 3):
            train(model, model_ema, method, guard, step)
        saved = write(model, model_ema, directory / str(number))
        train(model, model_ema, method, guard, 4)
        uninterrupted = write(model, model_ema, directory / f"{number}-step-4")
        # The same kind first: a ZeRO-3 engine replaces the linear layer of all engines that are built later.
        others = KINDS if "all" in sys.argv else [KINDS[(number + 1) % len(KINDS)]]
        for target in [source, *(kind for kind in others if kind != source)]:
            name = f"{number}-{KINDS.index(target)}"
            resumed, resumed_ema, resumed_method, resumed_guard = build(dist_info, **target)
            engine.load(resumed, resumed_ema, directory / str(number))
            saved_again = write(resumed, resumed_ema, directory / name)
            assert saved_again.keys() == saved.keys()
            changed = [key for key in saved if not torch.equal(saved[key], saved_again[key])]
            assert not changed, (source, target, changed[:3])
            train(resumed, resumed_ema, resumed_method, resumed_guard, 4)
            after_step = write(resumed, resumed_ema, directory / f"{name}-step-4")
            tolerance = {"rtol": 0, "atol": 0} if target == source else {"rtol": 1e-3, "atol": 1e-5}
            for key, value in uninterrupted.items():
                torch.testing.assert_close(after_step[key], value, **tolerance)
            if dist_info.rank == 0:
                print("resharded", source, "to", target, len(saved), "tensors")
    destroy_process_group()


if __name__ == "__main__":
    main()
