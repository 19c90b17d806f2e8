"""State dicts in other libraries' key names: timm loads ours, and we load official checkpoints."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.export import load_official_state_dict, official_state_dict, timm_state_dict
from pipeline.export.formats import mask_ratio_for
from pipeline.losses import patchify
from pipeline.methods import build_method
from pipeline.recipe import load_recipe

TINY = ("model.name=vit_tiny", "model.depth=2", "model.decoder_depth=2", "model.decoder_width=64")


def official_keys(depth: int, decoder_depth: int) -> set[str]:
    """Keys of the official models_mae.py of facebookresearch/mae, independent of our names."""
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    blocks += [f"decoder_blocks.{i}.{part}" for i in range(decoder_depth) for part in parts]
    layers = [*blocks, "patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    tokens = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    return tokens | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["vitb16_mae", "vitb16_emae", "vitb16_efficient_mae"])
def test_official_state_dict_has_official_keys_and_shapes(name):
    method = build_method(load_recipe(name, TINY))
    state = official_state_dict(method)
    assert state.keys() == official_keys(2, 2)
    assert state["patch_embed.proj.weight"].shape == (192, 3, 16, 16)
    assert state["pos_embed"].shape == (1, 197, 192) and state["decoder_pos_embed"].shape == (1, 197, 64)


def test_timm_computes_the_same_features():
    torch.manual_seed(0)
    method = build_method(load_recipe("vitb16_mae", ["model.name=vit_tiny"]))
    timm_model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    missing, unexpected = timm_model.load_state_dict(timm_state_dict(method))
    assert not missing and not unexpected
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours = method.encoder(patchify(images, 16), torch.arange(196).expand(2, 196))
        assert torch.allclose(ours, timm_model.forward_features(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "model"), [("vitl16_mae", "vit_large_patch16_224"), ("vith14_mae", "vit_huge_patch14_224")]
)
def test_large_models_have_timms_keys_and_shapes(name, model):
    with torch.device("meta"):
        state = timm_state_dict(build_method(load_recipe(name)))
        expected = timm.create_model(model, num_classes=0).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}


@given(st.integers(2, 32).flatmap(lambda side: st.tuples(st.integers(1, side**2 - 1), st.just(side**2))))
def test_mask_ratio_keeps_as_many_patches_as_training(counts):
    num_visible, num_patches = counts
    assert int(num_patches * (1 - mask_ratio_for(num_visible, num_patches))) == num_visible


def test_rejected_state_dict_changes_nothing():
    method = build_method(load_recipe("vitb16_mae", TINY))
    before = {key: value.clone() for key, value in official_state_dict(method).items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    state["head.weight"] = state.pop("mask_token")
    state["cls_token"] = torch.zeros(1, 1, 3)
    with pytest.raises(UserError) as caught:
        load_official_state_dict(method, state)
    for problem in ("missing mask_token", "unknown head.weight", "cls_token is (1, 1, 3)"):
        assert problem in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in official_state_dict(method).items())
