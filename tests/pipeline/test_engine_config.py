"""DeepSpeed gets the recipe's decisions and the file's engine settings; a contradiction is an error."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.recipe import load_recipe as load_any_recipe
from pipeline.train import engine
from pipeline.train.engine_config import engine_config, engine_overrides, ignored_keys

WORLD_SIZE = 8


def load_recipe(name, overrides=()):
    return load_any_recipe(name, ["engine.micro_batch=64", *overrides])


def write_config(tmp_path, content):
    path = tmp_path / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load_config(path, *overrides):
    recipe = load_recipe("vitl16_mae", [*overrides, *engine_overrides(path, overrides)])
    return recipe, engine_config(recipe, WORLD_SIZE, path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_files_complete_every_recipe(stage, precision):
    recipe = load_recipe("vitl16_mae", [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
    config = engine_config(recipe, WORLD_SIZE)
    assert config["train_batch_size"] == 4096 and config["gradient_accumulation_steps"] == 8
    assert config["zero_optimization"]["stage"] == stage
    assert [name for name in ("bf16", "fp16") if name in config] == [precision] * (precision != "fp32")
    assert ("data_types" in config) == (stage > 0 or precision == "fp32")
    assert "offload_optimizer" not in config["zero_optimization"] and "optimizer" not in config


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_uses_its_own_shipped_file(stage):
    recipe = load_recipe("vitl16_mae", [f"engine.zero_stage={stage}", "engine.offload=optimizer"])
    assert engine_config(recipe, WORLD_SIZE)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_offload_below_zero_2_is_rejected():
    with pytest.raises(UserError, match=r"engine\.offload: .*engine\.zero_stage"):
        load_recipe("vitl16_mae", ["engine.offload=optimizer"])


def test_users_file_sets_the_engine_and_the_recipe_the_rest(tmp_path):
    path = write_config(
        tmp_path,
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 64,
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False, "loss_scale_window": 500},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.05}},
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": 1000000,
                "allgather_bucket_size": "auto",
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
        },
    )
    recipe, config = load_config(path)
    assert recipe.engine.zero_stage == 2 and recipe.engine.offload == "optimizer"
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert config["train_batch_size"] == 4096 and config["bf16"]["enabled"]
    assert "fp16" not in config and "optimizer" not in config
    assert ignored_keys(path, recipe) == ["fp16.loss_scale_window"]
    fp16 = load_recipe("vitl16_mae", ["engine.precision=fp16"])
    assert ignored_keys(path, fp16) == ["zero_optimization.offload_optimizer.pin_memory"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"train_batch_size": 2048}, ("train_batch_size is 2048", "data.global_batch is 4096")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "optim.clip_grad is 0.0")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled is true", "engine.precision")),
        ({"optimizer": {"type": "Lamb"}}, ('optimizer.type is "Lamb"', '"AdamW"')),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ("optimizer.params.lr is 0.001", "optim.base_lr")),
        ({"optimizer": {"params": {"adam_w_mode": True}}}, ("optimizer.params.adam_w_mode", "section optim")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler.type", "section optim")),
        ({"activation_checkpointing": {"profile": True}}, ("activation_checkpointing.profile", "section engine")),
        ({"amp": {"enabled": True}}, ("amp.enabled", "engine.precision")),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ("offload_param.device", "engine.offload")),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ("grad_accum_dtype", '"fp32"')),
        ("{", ("not JSON",)),
        ("[]", ("must be an object",)),
    ],
)
def test_contradiction_names_the_keys_of_both_files(tmp_path, content, parts):
    path = write_config(tmp_path, content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(part in message for part in parts), message


def test_other_keys_are_passed_to_deepspeed(tmp_path):
    content = {
        "comms_logger": {"enabled": True, "verbose": False},
        "wall_clock_breakdown": False,
        "zero_optimization": {"overlap_comm": True, "sub_group_size": 1000},
    }
    _, config = load_config(write_config(tmp_path, content))
    assert config["comms_logger"] == content["comms_logger"] and config["wall_clock_breakdown"] is False
    assert config["zero_optimization"] == {**content["zero_optimization"], "stage": 1}


@pytest.fixture
def one_rank(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("zero_optimization", "key"), [({"stag": 1}, "stag"), ({"reduce_bucket_size": "many"}, "reduce_bucket_size")]
)
def test_deepspeed_rejects_unknown_keys_and_wrong_values(tmp_path, one_rank, zero_optimization, key):
    path = write_config(tmp_path, {"zero_optimization": zero_optimization})
    recipe = load_recipe("vitl16_mae", engine_overrides(path, []))
    with pytest.raises(UserError, match=rf"^--deepspeed_config: .*\b{key}: "):
        engine.check_config(engine_config(recipe, 1, path))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accepts_the_shipped_files(one_rank, stage, precision):
    recipe = load_recipe("vitl16_mae", [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
    engine.check_config(engine_config(recipe, 1))


@pytest.mark.parametrize("override", ["engine.zero_stage={}", "engine.zero_stage = {}", "engine={{zero_stage: {}}}"])
def test_set_must_not_contradict_the_file(tmp_path, override):
    path = write_config(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"--set engine\.zero_stage=2: .*my\.json has 3"):
        load_config(path, override.format(2))
    assert load_config(path, override.format(3))[0].engine.zero_stage == 3


def test_recipe_decides_on_offload_if_the_file_does_not(tmp_path):
    recipe = load_recipe("vitl16_mae", ["engine.zero_stage=2", "engine.offload=optimizer"])
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    path = write_config(tmp_path, {"zero_optimization": {"stage": 3}})
    section = load_recipe(tmp_path / "mine.yaml", engine_overrides(path, [])).engine
    assert (section.zero_stage, section.offload) == (3, "optimizer")
    path = write_config(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    section = load_recipe(tmp_path / "mine.yaml", engine_overrides(path, [])).engine
    assert (section.zero_stage, section.offload) == (2, "none")


def test_throughput_timer_is_off_unless_the_file_enables_it(tmp_path):
    assert load_config(write_config(tmp_path, {}))[1]["timers"]["throughput"] == {"enabled": False}
    timers = {"throughput": {"enabled": True, "synchronized": False}}
    assert load_config(write_config(tmp_path, {"timers": timers}))[1]["timers"] == timers


def test_bf16_gradients_are_reduced_in_fp32_by_default(tmp_path):
    key = "communication_data_type"
    assert load_config(write_config(tmp_path, {}))[1][key] == "fp32"
    assert load_config(write_config(tmp_path, {key: "bf16"}))[1][key] == "bf16"
    assert key not in load_config(write_config(tmp_path, {}), "engine.precision=fp16")[1]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--deepspeed_config .*nowhere\.json: "):
        engine_overrides(tmp_path / "nowhere.json", [])


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "0.190.1", "1.0.0"])
def test_unsupported_deepspeed_version_is_a_user_error(version):
    engine.check_version()
    with pytest.raises(UserError, match=f"deepspeed {version}: "):
        engine.check_version(version)
