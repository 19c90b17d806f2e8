"""Train every method with ZeRO-3 and activation checkpointing, all parameters partitioned, and with plain PyTorch.

`python -m methods_under_zero`; fails by an assertion.
"""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from small_codebook import VOCABULARY, small_codebook

from pipeline.distributed.collectives import destroy_process_group
from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.methods import build_method
from pipeline.methods.targets import TokenTarget
from pipeline.recipe import Recipe, load_recipe
from pipeline.train import engine
from pipeline.train.engine_config import ADAM_EPS, engine_config

TOKENS = {"method.target.name": "tokens", "method.target.tokenizer": "unused", "method.target.vocabulary": VOCABULARY}
METHODS = {
    "mae": {},
    "emae": {},
    "efficient_mae": {},
    "lomar": {},
    "emae, flattened": {"method.emae.difficulty_flatten": "true"},
    "lomar, flattened": {"method.lomar.difficulty_flatten": "true"},
    "mae, hog": {"method.target.name": "hog", "model.patch_size": 8},
    "mae, tokens": TOKENS,
    "beit, tokens": TOKENS,
    "lomar, tokens": TOKENS,
}
SMALL = {
    "data.image_size": 32,
    "model.patch_size": 4,
    "model.width": 32,
    "model.depth": 1,
    "model.decoder_width": 32,
    "method.target.name": "normalized_pixels",
    "method.efficient_mae.beta": 6,  # drops some patches of 4 px
    "engine.zero_stage": 3,
    "engine.activation_checkpointing": "true",
    "engine.micro_batch": 2,
}
PARTITION_ALL = {  # also parameters that are small or needed again soon
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
LR = 1e-3
CODEBOOK = small_codebook()


def make_recipe(title: str, dist_info: DistInfo, precision: str) -> Recipe:
    settings = {
        **SMALL,
        **METHODS[title],
        "method.name": title.partition(",")[0],
        "data.global_batch": SMALL["engine.micro_batch"] * dist_info.world_size,
        "engine.precision": precision,
    }
    return load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])


def build(recipe: Recipe):
    torch.manual_seed(0)
    method = build_method(recipe)
    if isinstance(method.target, TokenTarget):
        method.target.tokenizer.codebook = CODEBOOK
    return method


def make_batch(step: int, recipe: Recipe, noise_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(recipe.data.global_batch, 3, 32, 32, generator=generator)
    return images, torch.rand(len(images), noise_size, generator=generator)


def pytorch_losses(recipe: Recipe, steps: int) -> list[float]:
    """Train on the global batches with torch's AdamW, without activation checkpointing."""
    section = recipe.engine.model_copy(update={"activation_checkpointing": False})
    method = build(recipe.model_copy(update={"engine": section}))
    decays = {True: recipe.optim.weight_decay, False: 0.0}
    groups = [
        {"params": [p for p in method.parameters() if (p.ndim > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=recipe.optim.betas, eps=ADAM_EPS)
    losses = []
    for step in range(steps):
        loss = method(*make_batch(step, recipe, method.noise_size)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def engine_losses(recipe: Recipe, dist_info: DistInfo, config: Path, steps: int) -> list[float]:
    """Train with the engine, each rank on its part of the batch. Returns means over the ranks."""
    method = build(recipe)
    deepspeed_config = engine_config(recipe, dist_info.world_size, config)
    model = engine.build_engine(recipe, method, deepspeed_config, dist_info.device)
    losses = []
    for step in range(steps):
        batch = make_batch(step, recipe, method.noise_size)
        part = [x.tensor_split(dist_info.world_size)[dist_info.rank] for x in batch]
        engine.set_learning_rate(model, LR)
        loss = model(*part).loss
        assert not any(p.numel() for p in method.parameters()), "a parameter is not partitioned outside of its module"
        model.backward(loss)
        engine.step(model, lambda norm: torch.zeros(()))
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist_info.world_size)
    return losses


def main() -> None:
    dist_info = init_dist_env()
    # First: a ZeRO-3 engine replaces the linear layer of all modules that are built later.
    expected_losses = {title: pytorch_losses(make_recipe(title, dist_info, "fp32"), 3) for title in METHODS}
    engine.init_distributed(timeout_minutes=10)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "zero3.json")
        config.write_text(json.dumps({"zero_optimization": PARTITION_ALL}))
        for title, expected in expected_losses.items():
            full, half = (
                engine_losses(make_recipe(title, dist_info, precision), dist_info, config, len(expected))
                for precision in ("fp32", "bf16")
            )
            for losses, tolerance in ((full, 1e-4), (half, 2e-2)):
                message = f"{title}: {losses}, expected {expected}"
                torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0, msg=message)
            if dist_info.rank == 0:
                print("equal:", title, full, half)
    destroy_process_group()


if __name__ == "__main__":
    main()
