import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.finetune import FinetuneRecipe, load_finetune_recipe
from pipeline.recipe.loading import shipped_recipes


def complaint(*overrides, name="demo_emae"):
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
        ("method.name=beit", "method.name: input should be"),
        ("optim.base_lr=.nan", "optim.base_lr"),
        ("data.crop_scale=[0.5, 0.1]", "data.crop_scale: [0.5, 0.1] is not a range"),
        ("seed", "--set seed: expected KEY.KEY=VALUE"),
        ("seed.x=1", "--set seed.x: 'seed' is a value in this recipe, not a section"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_key(override, expected):
    assert expected in complaint(override)


def test_an_unknown_recipe_is_answered_with_the_names_there_are():
    message = complaint(name="demo_emea")
    assert "did you mean demo_emae?" in message and all(name in message for name in shipped_recipes())


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    for text in ["", "[1, 2]", "a: {", "seed: 1\nseed: 2", "\x00"]:
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        assert str(path) in complaint(name=path)


@given(st.integers(0, 2**63 - 1), st.floats(1e-6, 1.0), st.sampled_from(["mae", "emae"]), st.booleans())
def test_a_resolved_recipe_is_read_back_equal(tmp_path_factory, seed, rate, method, trace):
    overrides = [f"seed={seed}", f"optim.base_lr={rate!r}", f"method.name={method}", f"data.trace={trace}"]
    recipe = load_recipe("demo_emae", overrides)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_an_exponent_without_a_point_is_a_number():
    assert load_recipe("demo_emae", ["optim.base_lr=1e-4"]).optim.base_lr == 1e-4


def test_steps_take_the_place_of_epochs_and_the_other_way_round():
    assert load_recipe("demo_emae", ["train.epochs=3"]).train.steps is None
    recipe = load_recipe("vitb16_mae", ["train.steps=7", "optim.warmup_steps=2"])
    assert recipe.train.epochs is None and recipe.optim.warmup_epochs is None


def test_steps_and_warm_up_follow_from_epochs_and_the_size_of_the_set():
    recipe = load_recipe("vitb16_mae", ["train.epochs=800"])
    assert recipe.total_steps(1_281_167) == 250_228  # 800 x 1,281,167 / 4096, rounded up
    assert recipe.warmup_steps(1_281_167) == pytest.approx(12511.4, abs=0.1)
    assert recipe.lr == pytest.approx(2.4e-3)  # 1.5e-4 x 4096 / 256


@given(st.integers(1, 64), st.integers(1, 128), st.integers(1, 64))
def test_accumulation_makes_up_the_global_batch_or_is_refused(world, micro, accumulation):
    batch = world * micro * accumulation
    recipe = load_recipe("demo_emae", [f"data.global_batch={batch}", f"engine.micro_batch={micro}"])
    assert recipe.accumulation(world) == accumulation
    if world * micro > 1:
        with pytest.raises(UserError, match="is no multiple of"):
            load_recipe(
                "demo_emae", [f"data.global_batch={batch + 1}", f"engine.micro_batch={micro}"]
            ).accumulation(world)


def test_differences_name_the_keys_that_differ():
    one, other = load_recipe("demo_emae"), load_recipe("demo_emae", ["seed=4", "data.flip=false"])
    assert one.differences(other) == {"seed": (0, 4), "data.flip": (True, False)}
    assert one.differences(one) == {}


def test_every_shipped_recipe_is_possible():
    for name in shipped_recipes():
        if name.startswith("finetune_"):
            assert isinstance(load_finetune_recipe(name, "W"), FinetuneRecipe)
        else:
            assert isinstance(load_recipe(name), Recipe)


def test_a_recipe_of_another_command_is_said_to_be_one():
    tuning = r"finetune_tiny\.yaml: is a recipe for `finetune`: it has a section .*; give one of `pretrain`"
    with pytest.raises(UserError, match=tuning):
        load_recipe("finetune_tiny")
    training = r"demo_emae\.yaml: is a recipe for `pretrain`: it has a section .*; give one of `finetune`"
    with pytest.raises(UserError, match=training):
        load_finetune_recipe("demo_emae", "W")


def test_keys_of_the_removed_muon_change_nothing_and_muon_is_an_error(tmp_path):
    path = tmp_path / "recipe.yaml"
    old = yaml.safe_load(load_recipe("demo_emae").to_yaml())
    old["optim"] |= {"name": "adamw", "muon_lr": 0.5, "muon_momentum": 0.9}
    path.write_text(yaml.safe_dump(old))
    assert load_recipe(path) == load_recipe("demo_emae")
    with pytest.raises(UserError, match=r"recipe.yaml.*optim.name: Muon was removed"):
        load_recipe(path, ["optim.name=muon"])
