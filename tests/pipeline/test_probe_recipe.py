"""The recipe of a linear probe: MAE's protocol by default, and one-line errors."""

import pytest

from pipeline.errors import UserError
from pipeline.recipe.linear_probe import load_probe_recipe

PIXELS = {"probe": {"weights": "pixels"}}


def test_the_default_is_maes_protocol():
    recipe = load_probe_recipe(PIXELS)
    assert (recipe.data.global_batch, recipe.data.crop_scale, recipe.data.flip) == (16384, (0.08, 1.0), True)
    assert recipe.train.epochs == 90 and recipe.probe.warmup_epochs == 10 and 0.1 in recipe.probe.base_lrs
    assert recipe.total_steps(1_281_167) == 7038


def test_an_override_leaves_the_rest_of_the_protocol():
    recipe = load_probe_recipe(PIXELS, ["data.global_batch=1024", "train.steps=7"])
    assert recipe.data.holdout == 0.01 and recipe.data.crop_scale == (0.08, 1.0)
    assert recipe.total_steps(99) == 7 and recipe.train.checkpoint_every == 500
    assert recipe == load_probe_recipe(PIXELS, ["data={global_batch: 1024}", "train={steps: 7}"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.holdout=0"], "data.holdout: must be positive"),
        (["data.global_batch=1"], "data.global_batch: must be at least 2"),
        (["probe.base_lrs=[0.1, 0.1]"], "probe.base_lrs: .* different"),
        (["data.crops_per_image=2"], "data.crops_per_image: is not supported"),
        (["data.max_undecodable=3"], "data.max_undecodable: is not supported"),
        (["probe.pol=mean"], r"probe.pol: unknown key \(did you mean pool\?\)"),
        (["data.image_size=32"], "data.image_size: .* --weights; give --image-size"),
        (["data={image_size: 32, global_batch: 8}"], "data.image_size: .* --weights"),
        (["data.mean=[0, 0, 0]"], "data.mean: .* --weights"),
        (["data.std=[1, 1, 1]"], "data.std: .* --weights"),
        (["probe.digest=abc"], "probe.digest: .* --weights"),
        (["probe.weights=pixels:8"], "probe.weights: has its own option"),
        (["probe.center_crops=true", "data.crop_scale=[0.2, 1]"], "data.crop_scale: .* --center-crops"),
        (["probe.center_crops=true", "data.crop_ratio=[1, 1]"], "data.crop_ratio: .* --center-crops"),
        (["probe.center_crops=true", "data.flip=false"], "data.flip: .* --center-crops"),
    ],
)
def test_an_invalid_override_is_one_line_with_its_key(overrides, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_probe_recipe(PIXELS, overrides)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_divide_is_an_error():
    recipe = load_probe_recipe(PIXELS, ["data.global_batch=100", "engine.micro_batch=30"])
    with pytest.raises(UserError, match=r"data\.global_batch: 100"):
        recipe.gradient_accumulation_steps(1)


def test_cached_features_need_no_gradient_accumulation():
    recipe = load_probe_recipe(PIXELS, ["data.global_batch=100", "probe.center_crops=true"])
    assert recipe.gradient_accumulation_steps(2) == 1
    with pytest.raises(UserError, match=r"data\.global_batch: 100"):
        recipe.gradient_accumulation_steps(3)


def test_a_share_of_the_labels_is_given_once():
    options = {**PIXELS, "data": {"subset": 0.01, "subset_by_class": True}}
    assert load_probe_recipe(options).data.subset == 0.01
    with pytest.raises(UserError, match=r"--set data\.subset: .* --labels"):
        load_probe_recipe(options, ["data.subset=0.5"])
