"""What DeepSpeed is given: the recipe's decisions, the file's engine settings, and no contradiction."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.train.engine_config import engine_config, engine_overrides, unused

WORLD = 8


def given(tmp_path, content) -> object:
    path = tmp_path / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def config_of(path, *overrides):
    recipe = load_recipe("vitl16_mae", [*overrides, *engine_overrides(path, overrides)])
    return recipe, engine_config(recipe, WORLD, path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_shipped_file_and_the_recipe_make_a_whole_configuration(stage, precision):
    recipe = load_recipe("vitl16_mae", [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
    config = engine_config(recipe, WORLD)
    assert config["train_batch_size"] == 4096 and config["gradient_accumulation_steps"] == 8
    assert config["zero_optimization"]["stage"] == stage
    assert [name for name in ("bf16", "fp16") if name in config] == [precision] * (precision != "fp32")
    assert ("data_types" in config) == (stage > 0 or precision == "fp32")
    assert "offload_optimizer" not in config["zero_optimization"] and "optimizer" not in config


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_takes_the_file_that_ships_for_it(stage):
    recipe = load_recipe("vitl16_mae", [f"engine.zero_stage={stage}", "engine.offload=optimizer"])
    assert engine_config(recipe, WORLD)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_offload_below_zero_2_is_refused():
    with pytest.raises(UserError, match="optimizer goes with engine"):
        load_recipe("vitl16_mae", ["engine.offload=optimizer"])


def test_a_users_file_sets_the_engine_and_leaves_the_rest_to_the_recipe(tmp_path):
    path = given(
        tmp_path,
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 64,
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False, "loss_scale_window": 500},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.05},
            },
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": 1000000,
                "allgather_bucket_size": "auto",
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
        },
    )
    recipe, config = config_of(path)
    assert recipe.engine.zero_stage == 2 and recipe.engine.offload == "optimizer"
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert config["train_batch_size"] == 4096 and config["bf16"]["enabled"]
    assert "fp16" not in config and "optimizer" not in config
    assert unused(path, recipe) == ["fp16.loss_scale_window"]
    assert unused(path, load_recipe("vitl16_mae", ["engine.precision=fp16"])) == [
        "zero_optimization.offload_optimizer.pin_memory"
    ]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"train_batch_size": 2048}, ("train_batch_size is 2048", "data.global_batch is 4096")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "optim.clip_grad is 0.0")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled is true", "engine.precision")),
        ({"optimizer": {"type": "Lamb"}}, ('optimizer.type is "Lamb"', 'optimiser is "AdamW"')),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ("optimizer.params.lr is 0.001", "optim.base_lr")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler.type", "the recipe decides that, by optim")),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            ("offload_param", "not known to be safe"),
        ),
        ({"zero_optimization": {"stag": 1}}, ("zero_optimization.stag", "take it out")),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ("grad_accum_dtype", '"fp32"')),
        ("{", ("not JSON",)),
        ("[]", ("not a JSON object",)),
    ],
)
def test_a_contradiction_is_one_line_that_names_both_places(tmp_path, content, parts):
    path = given(tmp_path, content)
    with pytest.raises(UserError) as caught:
        config_of(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    "written", ["engine.zero_stage={}", "engine.zero_stage = {}", "engine={{zero_stage: {}}}"]
)
def test_set_against_the_file_is_refused_and_the_same_is_not(tmp_path, written):
    path = given(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"--set engine.zero_stage=2: .*my.json says 3"):
        config_of(path, written.format(2))
    assert config_of(path, written.format(3))[0].engine.zero_stage == 3


def test_a_file_without_offload_leaves_that_to_the_recipe(tmp_path):
    recipe = load_recipe("vitl16_mae", ["engine.zero_stage=2", "engine.offload=optimizer"])
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    path = given(tmp_path, {"zero_optimization": {"stage": 3}})
    engine = load_recipe(tmp_path / "mine.yaml", engine_overrides(path, [])).engine
    assert (engine.zero_stage, engine.offload) == (3, "optimizer")
    path = given(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    engine = load_recipe(tmp_path / "mine.yaml", engine_overrides(path, [])).engine
    assert (engine.zero_stage, engine.offload) == (2, "none")


def test_deepspeeds_clock_is_off_unless_the_file_turns_it_on(tmp_path):
    assert config_of(given(tmp_path, {}))[1]["timers"]["throughput"] == {"enabled": False}
    timers = {"throughput": {"enabled": True, "synchronized": False}}
    assert config_of(given(tmp_path, {"timers": timers}))[1]["timers"] == timers


def test_in_bf16_gradients_are_exchanged_in_fp32_unless_the_file_says_otherwise(tmp_path):
    assert config_of(given(tmp_path, {}))[1]["communication_data_type"] == "fp32"
    assert (
        config_of(given(tmp_path, {"communication_data_type": "bf16"}))[1]["communication_data_type"]
        == "bf16"
    )
    assert "communication_data_type" not in config_of(given(tmp_path, {}), "engine.precision=fp16")[1]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--deepspeed_config .*nowhere.json: cannot be read"):
        engine_overrides(tmp_path / "nowhere.json", [])
