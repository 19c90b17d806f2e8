"""Carry weights, moments and averages from kinds of engines to others, and see that no bit is lost.

python -m carried_state [all]       from each kind to itself and the next, or to all; fails by an assertion
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


def build(world, precision="fp32", **kind):
    settings = {
        **SMALL,
        **{f"engine.{key}": value for key, value in kind.items()},
        "engine.precision": precision,
        "data.global_batch": 4 * world.size,
    }
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(0)
    method = build_method(recipe)
    model = engine.build_engine(recipe, method, engine_config(recipe, world.size), world.device)
    return model, ModelEma(model, DECAY), method, Guard(recipe.guard, precision, world.device, None)


def write(model, model_ema, folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold, by kind and parameter, whoever wrote which part."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    engine.save(model, model_ema, folder)
    dist.barrier()
    if dist.get_rank() == 0:
        engine.consolidate_fp32_weights(model, model_ema, folder)
    dist.barrier()
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(folder.glob("rank-*")):
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["ranges"])
        for key, values in load_file(path).items():
            parts.setdefault(key, []).append((ranges[key.partition(":")[2]][0], values))
    return {key: torch.cat([v for _, v in sorted(p, key=lambda part: part[0])]) for key, p in parts.items()}


def check_average(world) -> None:
    """The average is what it is by its definition, step by step."""
    model, model_ema, method, guard = build(world, zero_stage=0)
    expected = {name: p.detach().clone() for name, p in method.named_parameters()}
    for step in range(1, 6):
        assert train(model, model_ema, method, guard, step, broken=step == 3) == (step == 3)
        if step != 3:
            for name, p in method.named_parameters():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * p.detach()
    folder = Path(tempfile.mkdtemp()) / "average"
    engine_saved = write(model, model_ema, folder)
    for name, values in expected.items():
        torch.testing.assert_close(engine_saved[f"ema:{name}"], values.flatten(), rtol=1e-6, atol=1e-7)
    print("average as defined")


def main() -> None:
    world = init_dist_env()
    engine.init_distributed(timeout_minutes=10)
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    place = Path(box[0])
    if world.size == 1:
        check_average(world)
    for number, source in enumerate(KINDS):
        model, model_ema, method, guard = build(world, **source)
        for step in (1, 2, 3):
            train(model, model_ema, method, guard, step)
        saved = write(model, model_ema, place / str(number))
        train(model, model_ema, method, guard, 4)
        uninterrupted = write(model, model_ema, place / f"{number}-on")
        # Its own kind first: an engine of ZeRO 3 leaves another linear layer behind for all that follow.
        others = KINDS if "all" in sys.argv else [KINDS[(number + 1) % len(KINDS)]]
        for target in [source, *(kind for kind in others if kind != source)]:
            to, its_average, its_method, its_guard = build(world, **target)
            engine.load(to, its_average, place, str(number))
            again = write(to, its_average, place / f"{number}-{KINDS.index(target)}")
            assert again.keys() == saved.keys()
            moved = [key for key in saved if not torch.equal(saved[key], again[key])]
            assert not moved, (source, target, moved[:3])
            train(to, its_average, its_method, its_guard, 4)
            after = write(to, its_average, place / f"{number}-{KINDS.index(target)}-on")
            tolerance = {"rtol": 0, "atol": 0} if target == source else {"rtol": 1e-3, "atol": 1e-5}
            for key, value in uninterrupted.items():
                torch.testing.assert_close(after[key], value, **tolerance)
            if world.rank == 0:
                print("carried", source, "to", target, len(saved), "tensors")
    destroy_process_group()


if __name__ == "__main__":
    main()
