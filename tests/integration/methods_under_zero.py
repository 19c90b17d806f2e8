"""Train every method under ZeRO 3 with activation checkpointing, every parameter in parts, beside plain
PyTorch. `python -m methods_under_zero`; fails by an assertion."""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.methods import build_method
from pipeline.recipe import Recipe, load_recipe
from pipeline.train import engine
from pipeline.train.engine_config import ADAM_EPS, engine_config

METHODS = {
    "mae": {},
    "emae": {},
    "efficient_mae": {},
    "lomar": {},
    "emae, flattened": {"method.emae.difficulty_flatten": "true"},
    "lomar, flattened": {"method.lomar.difficulty_flatten": "true"},
}
SMALL = {
    "data.image_size": 32,
    "model.patch_size": 4,
    "model.width": 32,
    "model.depth": 1,
    "model.decoder_width": 32,
    "method.normalize_targets": "true",
    "method.efficient_mae.beta": 6,  # of patches of 4 px it drops some
    "engine.zero_stage": 3,
    "engine.activation_checkpointing": "true",
    "engine.micro_batch": 2,
}
NO_PARAMETER_STAYS = {  # however small it is, and however soon it is needed again
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
LR = 1e-3


def recipe_of(title: str, world: DistInfo, precision: str) -> Recipe:
    settings = {
        **SMALL,
        **METHODS[title],
        "method.name": title.partition(",")[0],
        "data.global_batch": SMALL["engine.micro_batch"] * world.size,
        "engine.precision": precision,
    }
    return load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])


def build(recipe: Recipe):
    torch.manual_seed(0)
    return build_method(recipe)


def batch(step: int, recipe: Recipe, noise_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(recipe.data.global_batch, 3, 32, 32, generator=generator)
    return images, torch.rand(len(images), noise_size, generator=generator)


def plain_losses(recipe: Recipe, steps: int) -> list[float]:
    """Of the whole batches, by torch's AdamW alone, without checkpointing."""
    section = recipe.engine.model_copy(update={"activation_checkpointing": False})
    method = build(recipe.model_copy(update={"engine": section}))
    decays = {True: recipe.optim.weight_decay, False: 0.0}
    groups = [
        {"params": [p for p in method.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=recipe.optim.betas, eps=ADAM_EPS)
    losses = []
    for step in range(steps):
        loss = method(*batch(step, recipe, method.noise_size)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def engine_losses(recipe: Recipe, world: DistInfo, config: Path, steps: int) -> list[float]:
    """Means over the ranks, each of which has a part of the batch."""
    method = build(recipe)
    model = engine.build_engine(recipe, method, engine_config(recipe, world.size, config), world.device)
    losses = []
    for step in range(steps):
        mine = [x.tensor_split(world.size)[world.rank] for x in batch(step, recipe, method.noise_size)]
        engine.set_learning_rate(model, LR)
        loss = model(*mine).loss
        assert not any(p.numel() for p in method.parameters()), "a parameter is whole outside of its module"
        model.backward(loss)
        engine.step(model, lambda norm: torch.zeros(()))
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world.size)
    return losses


def main() -> None:
    world = init_dist_env()
    # First of all: an engine of ZeRO 3 leaves another linear layer behind for all that follow.
    plain = {title: plain_losses(recipe_of(title, world, "fp32"), 3) for title in METHODS}
    engine.init_distributed(timeout_minutes=10)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "zero3.json")
        config.write_text(json.dumps({"zero_optimization": NO_PARAMETER_STAYS}))
        for title, expected in plain.items():
            full, half = (
                engine_losses(recipe_of(title, world, precision), world, config, len(expected))
                for precision in ("fp32", "bf16")
            )
            for losses, tolerance in ((full, 1e-4), (half, 2e-2)):
                torch.testing.assert_close(
                    losses, expected, rtol=tolerance, atol=0, msg=f"{title}: {losses}, plainly {expected}"
                )
            if world.rank == 0:
                print("the same", title, full, half)
    destroy_process_group()


if __name__ == "__main__":
    main()
