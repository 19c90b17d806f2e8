"""Which parameter is updated by what."""

import re

import pytest
import torch

from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.train import engine

TINY = ["model.depth=1", "model.decoder_depth=1", "engine.zero_stage=0"]


def groups_by_name(*overrides):
    recipe = load_recipe("demo_emae", [*TINY, *overrides])
    method = build_method(recipe)
    names = {id(p): name for name, p in method.named_parameters()}
    groups = engine._optimizer(recipe, method).param_groups
    return recipe, {names[id(p)]: group for group in groups for p in group["params"]}, names.values()


@pytest.mark.parametrize("method", ["mae", "emae", "efficient_mae", "lomar"])
def test_muon_gets_the_matrices_inside_the_blocks_and_nothing_else(method):
    recipe, groups, names = groups_by_name("optim.name=muon", f"method.name={method}")
    assert groups.keys() == set(names)
    muon = {name for name, group in groups.items() if group["use_muon"]}
    inside = re.compile(r"(encoder|decoder)\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight")
    assert muon == {name for name in names if inside.fullmatch(name)} and muon
    assert all(groups[name]["lr_scale"] * recipe.lr == pytest.approx(0.02) for name in muon)
    assert not any(groups[name]["weight_decay"] for name in names if name.endswith("bias"))


def test_adamw_is_torchs_fused_one_which_reads_the_guards_verdict_on_the_device():
    _, groups, names = groups_by_name()
    assert groups.keys() == set(names) and all(group["fused"] for group in groups.values())
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    for found_inf, moved in ((1.0, False), (0.0, True)):
        weight.grad = torch.ones(4)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert bool((weight != 1).all()) == moved and bool(optimizer.state[weight]["step"]) == moved
