"""Recipes are strict: errors name the key, overrides and deprecated keys work, and YAML round-trips."""

import functools
import logging

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.loading import DEPRECATED_KEYS, find_recipe, list_presets, mutable_keys, read_yaml
from pipeline.recipe.tasks import TASK_RECIPES, load_finetune_recipe


def error_of(*overrides, name="demo_emae"):
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.image_sze=64", "data.image_sze: unknown key (did you mean image_size?)"),
        ("colour=red", "colour: unknown key"),
        ("data.image_size=big", "data.image_size: input should be a valid integer, got 'big'"),
        ("data.global_batch=10000000000", "data.global_batch: input should be less than or equal to 1048576"),
        ("data.global_batch=2.5", "data.global_batch: input should be a valid integer"),
        ("data.image_size=60", "data.image_size: 60 is not a multiple of model.patch_size, 8"),
        ("method.emae.num_parts=3", "method.emae.num_parts: 3 does not divide the 64 patches"),
        ("engine.zero_stage=4", "engine.zero_stage: input should be 0, 1, 2 or 3"),
        ("method.name=simmim", "method.name: input should be"),
        ("optim.base_lr=.nan", "optim.base_lr"),
        ("data.crop_scale=[0.5, 0.1]", "data.crop_scale: [0.5, 0.1] is not a range"),
        ("seed", "--set seed: expected KEY.KEY=VALUE"),
        ("seed.x=1", "--set seed.x: 'seed' is a value in this recipe, not a section"),
    ],
)
def test_an_invalid_override_is_one_line_with_its_key(override, expected):
    assert expected in error_of(override)


def test_an_unknown_recipe_lists_the_presets():
    message = error_of(name="demo_emea")
    assert "did you mean demo_emae?" in message and all(name in message for name in list_presets())


def test_an_invalid_recipe_file_is_named(tmp_path):
    for text in ["", "[1, 2]", "a: {", "seed: 1\nseed: 2", "\x00"]:
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        assert str(path) in error_of(name=path)


@given(st.integers(0, 2**63 - 1), st.floats(1e-6, 1.0), st.sampled_from(["mae", "emae"]), st.booleans())
def test_a_resolved_recipe_round_trips(tmp_path_factory, seed, rate, method, trace):
    overrides = [f"seed={seed}", f"optim.base_lr={rate!r}", f"method.name={method}", f"data.trace={trace}"]
    recipe = load_recipe("demo_emae", overrides)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_an_exponent_without_a_point_is_a_number():
    assert load_recipe("demo_emae", ["optim.base_lr=1e-4"]).optim.base_lr == 1e-4


def test_overriding_steps_removes_epochs_and_vice_versa():
    assert load_recipe("demo_emae", ["train.epochs=3"]).train.steps is None
    recipe = load_recipe("vitb16_mae", ["train.steps=7", "optim.warmup_steps=2"])
    assert recipe.train.epochs is None and recipe.optim.warmup_epochs is None


def test_steps_and_warm_up_follow_from_epochs_and_samples():
    recipe = load_recipe("vitb16_mae", ["train.epochs=800"])
    assert recipe.total_steps(1_281_167) == 250_228  # 800 x 1,281,167 / 4096, rounded up
    assert recipe.warmup_steps(1_281_167) == pytest.approx(12511.4, abs=0.1)
    assert recipe.peak_lr == pytest.approx(2.4e-3)  # 1.5e-4 x 4096 / 256


@given(st.integers(1, 64), st.integers(1, 128), st.integers(1, 64))
def test_gradient_accumulation_gives_the_global_batch(world_size, micro_batch, steps):
    def recipe(global_batch):
        return load_recipe("demo_emae", [f"data.global_batch={global_batch}", f"engine.micro_batch={micro_batch}"])

    batch = world_size * micro_batch * steps
    assert recipe(batch).gradient_accumulation_steps(world_size) == steps
    if world_size * micro_batch > 1:
        with pytest.raises(UserError, match=r"data\.global_batch"):
            recipe(batch + 1).gradient_accumulation_steps(world_size)


def test_differences_have_the_keys_that_differ():
    one, other = load_recipe("demo_emae"), load_recipe("demo_emae", ["seed=4", "data.flip=false"])
    assert one.differences(other) == {"seed": (0, 4), "data.flip": (True, False)}
    assert one.differences(one) == {}


def test_every_preset_is_valid():
    for name in list_presets():
        if "task" in read_yaml(find_recipe(name)) or name.startswith("finetune_"):
            recipe = load_finetune_recipe(name, "W")
            assert type(recipe) is TASK_RECIPES[recipe.task.name]
        else:
            load_recipe(name)


def test_a_recipe_of_another_command_names_that_command():
    with pytest.raises(UserError, match=r"finetune_tiny\.yaml: is a recipe for `finetune`"):
        load_recipe("finetune_tiny")
    with pytest.raises(UserError, match=r"demo_emae\.yaml: is a recipe for `pretrain`"):
        load_finetune_recipe("demo_emae", "W")


def test_mutable_keys_are_those_that_affect_only_execution():
    common = {
        "data": "sources read_threads read_ahead_mb timeout_s retries cache_dir cache_gb decode_threads "
        "prefetch roi_decode hw_decoder_load max_undecodable trace",
        "engine": "micro_batch activation_checkpointing compile deterministic zero_stage offload timeout_minutes",
        "guard": "window spike_z max_consecutive_skips max_rollbacks",
        "train": "steps epochs log_every checkpoint_every keep_checkpoints keep_every wandb profile_steps",
    }
    keys = {f"{section}.{name}" for section, names in common.items() for name in names.split()}
    assert mutable_keys(Recipe) == keys | {"evals.knn_every", "evals.knn_samples"}
    assert mutable_keys(ClassificationRecipe) == keys | {"evaluation.every_epochs"}


@pytest.mark.parametrize(("old", "new"), DEPRECATED_KEYS.items())
def test_a_deprecated_key_is_accepted_with_one_message(tmp_path, caplog, monkeypatch, old, new):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)  # as before setup_logging()
    (*sections, old_name), new_name = old.split("."), new.split(".")[-1]
    expected = load_recipe("demo_emae", [f"{new}=7"])
    tree = yaml.safe_load(load_recipe("demo_emae").to_yaml())
    section = functools.reduce(dict.__getitem__, sections, tree)
    del section[new_name]
    section[old_name] = 7
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(tree))
    for name, overrides in ((path, []), ("demo_emae", [f"{old}=7"])):
        assert load_recipe(name, overrides) == expected
        (message,) = caplog.messages
        assert old in message and "deprecated" in message and "\n" not in message
        caplog.clear()
    assert load_recipe(path, [f"{new}=8"]) == load_recipe("demo_emae", [f"{new}=8"])
    assert old in error_of(f"{old}=7", f"{new}=7")
    section[new_name] = 7
    path.write_text(yaml.safe_dump(tree))
    assert f"{path}: {old}" in error_of(name=path)


def test_keys_of_muon_are_ignored_and_muon_is_an_error(tmp_path):
    path = tmp_path / "recipe.yaml"
    old = yaml.safe_load(load_recipe("demo_emae").to_yaml())
    old["optim"] |= {"name": "adamw", "muon_lr": 0.5, "muon_momentum": 0.9}
    path.write_text(yaml.safe_dump(old))
    assert load_recipe(path) == load_recipe("demo_emae")
    with pytest.raises(UserError, match=r"recipe.yaml.*optim\.name"):
        load_recipe(path, ["optim.name=muon"])
