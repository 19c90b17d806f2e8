"""Which parameter is updated by what."""

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
    groups = engine._optimizer(recipe, method).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in method.parameters()}
    assert {decays[id(p)] for p in method.parameters() if p.ndim > 1} == {recipe.optim.weight_decay}
    assert {decays[id(p)] for p in method.parameters() if p.ndim <= 1} == {0.0}


def test_adamw_is_torchs_fused_one_which_reads_the_guards_verdict_on_the_device():
    recipe = load_recipe("demo_emae", TINY)
    method = build_method(recipe)
    groups = engine._optimizer(recipe, method).param_groups
    assert all(group["fused"] for group in groups)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    for found_inf, moved in ((1.0, False), (0.0, True)):
        weight.grad = torch.ones(4)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert bool((weight != 1).all()) == moved and bool(optimizer.state[weight]["step"]) == moved
