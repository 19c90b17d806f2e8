"""Weight decay per parameter, and the fused AdamW that can skip a step."""

import pytest
import torch

from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train import engine

TINY = ["model.depth=1", "model.decoder_depth=1", "engine.zero_stage=0"]


@pytest.mark.parametrize("name", ["mae", "emae", "efficient_mae", "lomar"])
def test_only_matrices_decay(name):
    recipe = load_recipe("demo_emae", [*TINY, f"method.name={name}"])
    method = build_method(recipe)
    groups = engine.build_optimizer(recipe, method).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in method.parameters()}
    assert {decays[id(p)] for p in method.parameters() if p.ndim > 1} == {recipe.optim.weight_decay}
    assert {decays[id(p)] for p in method.parameters() if p.ndim <= 1} == {0.0}


def test_fused_adamw_skips_a_step_on_the_device():
    recipe = load_recipe("demo_emae", TINY)
    assert all(group["fused"] for group in engine.build_optimizer(recipe, build_method(recipe)).param_groups)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    for should_skip in (1.0, 0.0):
        weight.grad = torch.ones(4)
        with engine.skip_step_if(optimizer, lambda value=should_skip: torch.tensor(value)):
            optimizer.step()
        moved = not should_skip
        assert bool((weight != 1).all()) == moved and bool(optimizer.state[weight]["step"]) == moved
