"""A run has the losses of plain PyTorch, on every ZeRO stage and on one rank or two."""

import pytest
import torch
from pytest import approx
from runs import SMALL

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train.lr_schedule import learning_rate

STEPS = 20


@pytest.fixture(scope="module")
def pytorch(shards):
    """Losses and gradient norms of the same steps without DeepSpeed and without gradient accumulation."""
    settings = {**SMALL, "engine.micro_batch": SMALL["data.global_batch"], "train.steps": STEPS}
    recipe = load_recipe("demo_emae", [f"{key}={value}" for key, value in settings.items()])
    torch.manual_seed(recipe.seed)
    method = build_method(recipe)
    matrices = [p for p in method.parameters() if p.ndim > 1]
    vectors = [p for p in method.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=recipe.optim.betas,
    )
    loader = Loader(ShardReader(shards), recipe, method.noise_size, torch.device("cpu"))
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, recipe.optim.warmup_steps, recipe.peak_lr)
        batch = loader.next()
        loss = method(batch.images, batch.noise).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in method.parameters()).item())
        optimizer.step()
        losses.append(loss.item())
    loader.close()
    return losses, norms


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(1, 1), (2, 0), pytest.param(2, 1, marks=pytest.mark.soak), pytest.param(2, 2, marks=pytest.mark.soak), (2, 3)],
)
def test_losses_are_those_of_plain_pytorch(run, pytorch, ranks, stage):
    lines = run.train(ranks, engine__zero_stage=stage, train__steps=STEPS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses, norms = pytorch
    assert [line["loss"] for line in lines] == approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == approx(norms, rel=1e-2)
