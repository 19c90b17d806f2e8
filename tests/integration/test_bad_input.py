"""A user's mistake: one clear line, exit code 2, nothing written."""

import os

import pytest
from forkserver import run as fork
from runs import environment

from data_prep.shard_set import read_manifest, tar_path


def complaint(*arguments):
    finished = fork(["-m", "pipeline", *arguments], env=environment())
    lines = [line for line in finished.stderr.splitlines() if line.startswith("pipeline: error: ")]
    assert finished.returncode == 2 and len(lines) == 1 and "Traceback" not in finished.stderr, (
        finished.stderr
    )
    return lines[0]


@pytest.fixture
def pretrain(shards, tmp_path):
    """Runs pretrain with a mistake in it; returns the complaint, and checks that no run directory is left."""

    def start(*arguments, recipe="demo_emae", data=None):
        run = tmp_path / "run"
        message = complaint("pretrain", recipe, "--data", data or shards, "--run", run, *arguments)
        assert not run.exists()
        return message

    return start


def test_an_unknown_recipe_key(pretrain):
    assert "model.patchsize: unknown key (did you mean patch_size?)" in pretrain("--set", "model.patchsize=8")


def test_an_unknown_recipe(pretrain):
    assert "did you mean demo_emae?" in pretrain(recipe="demo_eame")


def test_a_global_batch_that_does_not_divide(pretrain):
    message = pretrain("--set", "data.global_batch=50")
    assert "data.global_batch: 50 is no multiple of engine.micro_batch x ranks" in message


def test_a_deepspeed_config_that_contradicts_the_recipe(pretrain, tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"train_batch_size": 7}')
    message = pretrain("--deepspeed_config", path)
    assert f"{path}: train_batch_size is 7, the recipe's data.global_batch is 16" in message


def test_a_value_that_deepspeed_does_not_take(pretrain, tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": "many"}}')
    message = pretrain("--deepspeed_config", path)
    assert "--deepspeed_config: DeepSpeed does not take a value in it: reduce_bucket_size: " in message


def test_a_data_directory_without_manifest(pretrain, tmp_path):
    (tmp_path / "data").mkdir()
    message = pretrain(data=tmp_path / "data")
    assert "manifest.json" in message and "python -m data_prep" in message


def test_a_data_directory_that_is_not_there(pretrain, tmp_path):
    assert "nowhere" in pretrain(data=tmp_path / "nowhere")


def test_a_shard_whose_bytes_are_not_the_manifests(pretrain, shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = tar_path(copy, read_manifest(copy).shards[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert path.name in pretrain(data=copy)


def test_a_run_directory_that_holds_something_else(shards, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    message = complaint("pretrain", "demo_emae", "--data", shards, "--run", tmp_path)
    assert "holds something that is no run" in message
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_run_begun_with_another_recipe_or_other_data(run, other_shards):
    run.train(1, train__steps=2)
    before = run.metrics()
    message = complaint(*run.arguments(train__steps=4, optim__base_lr=1e-5)[2:])
    assert "begun with another recipe: optim.base_lr was " in message and ", is 1e-05" in message
    run.shards = other_shards
    assert "was trained on another shard set" in complaint(*run.arguments(train__steps=4)[2:])
    assert run.metrics() == before


@pytest.mark.parametrize("what", ["nothing", "run"])
def test_reconstruct_of_what_is_no_run_or_of_no_images(run, shards, tmp_path, what):
    if what == "nothing":
        assert "no run directory" in complaint(
            "reconstruct", tmp_path / "x", "--images", shards, "--out", tmp_path / "x.png"
        )
    else:
        run.train(1, train__steps=1)
        text = tmp_path / "text"
        text.mkdir()
        (text / "photo.jpg").write_text("<html>not found</html>")
        out = tmp_path / "out.png"
        assert "no image there" in complaint("reconstruct", run.directory, "--images", text, "--out", out)
        assert not out.exists()
