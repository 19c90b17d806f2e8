"""The probe's recipe: MAE's protocol where nothing else is said, impossible ones in one line."""

import pytest

from pipeline.errors import UserError
from pipeline.recipe.linear_probe import load_probe_recipe

PIXELS = {"probe": {"weights": "pixels"}}


def test_by_itself_it_is_maes_protocol():
    recipe = load_probe_recipe(PIXELS)
    assert (recipe.data.global_batch, recipe.data.crop_scale, recipe.data.flip) == (16384, (0.08, 1.0), True)
    assert recipe.train.epochs == 90 and recipe.probe.warmup_epochs == 10 and 0.1 in recipe.probe.base_lrs
    assert recipe.total_steps(1_281_167) == 7038


def test_an_override_leaves_the_rest_of_the_protocol_as_it_is():
    recipe = load_probe_recipe(PIXELS, ["data.global_batch=1024", "train.steps=7"])
    assert recipe.data.holdout == 0.01 and recipe.data.crop_scale == (0.08, 1.0)
    assert recipe.total_steps(99) == 7 and recipe.train.checkpoint_every == 500
    assert recipe == load_probe_recipe(PIXELS, ["data={global_batch: 1024}", "train={steps: 7}"])


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.holdout=0"], "data.holdout: is 0"),
        (["data.global_batch=1"], "data.global_batch: .* so 2 at least"),
        (["probe.base_lrs=[0.1, 0.1]"], "probe.base_lrs: .* different"),
        (["data.crops_per_image=2"], "data.crops_per_image: is not for a probe"),
        (["data.max_undecodable=3"], "data.max_undecodable: is not for a probe"),
        (["probe.pol=mean"], r"probe.pol: unknown key \(did you mean pool\?\)"),
        (["data.image_size=32"], "data.image_size: follows from --weights; give --image-size"),
        (["data={image_size: 32, global_batch: 8}"], "data.image_size: follows from --weights"),
        (["data.mean=[0, 0, 0]"], "data.mean: follows from --weights"),
        (["data.std=[1, 1, 1]"], "data.std: follows from --weights"),
        (["probe.digest=abc"], "probe.digest: follows from --weights"),
        (["probe.weights=pixels:8"], "probe.weights: has an option of its own; give that"),
        (["probe.center_crops=true", "data.crop_scale=[0.2, 1]"], "data.crop_scale: is not for --center"),
        (["probe.center_crops=true", "data.crop_ratio=[1, 1]"], "data.crop_ratio: is not for --center-crops"),
        (["probe.center_crops=true", "data.flip=false"], "data.flip: is not for --center-crops"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(overrides, complaint):
    with pytest.raises(UserError, match=complaint) as refusal:
        load_probe_recipe(PIXELS, overrides)
    assert "\n" not in str(refusal.value)


def test_a_batch_that_cannot_be_shared_is_refused():
    recipe = load_probe_recipe(PIXELS, ["data.global_batch=100", "engine.micro_batch=30"])
    with pytest.raises(UserError, match=r"data.global_batch: 100 is no multiple"):
        recipe.accumulation(1)


def test_a_share_of_the_labels_is_given_once():
    given = {**PIXELS, "data": {"subset": 0.01, "subset_by_class": True}}
    assert load_probe_recipe(given).data.subset == 0.01
    with pytest.raises(
        UserError, match=r"--set data.subset: follows from --labels; leave one of the two out"
    ):
        load_probe_recipe(given, ["data.subset=0.5"])
