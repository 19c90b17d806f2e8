"""A user error is one clear line with exit code 2, and nothing is written."""

import os

import pytest
from forkserver import run as fork
from runs import environment

from data_prep.shard_set import read_manifest, tar_path


def error_line(*arguments):
    finished = fork(["-m", "pipeline", *arguments], env=environment())
    lines = [line for line in finished.stderr.splitlines() if line.startswith("pipeline: error: ")]
    assert finished.returncode == 2 and len(lines) == 1, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return lines[0]


@pytest.fixture
def pretrain_error(shards, tmp_path):
    """Run `pretrain` with an invalid argument. Returns the error line, and checks that no run directory was created."""

    def start(*arguments, recipe="demo_emae", data=None):
        run = tmp_path / "run"
        message = error_line("pretrain", recipe, "--data", data or shards, "--run", run, *arguments)
        assert not run.exists()
        return message

    return start


def test_unknown_recipe_key(pretrain_error):
    message = pretrain_error("--set", "model.patchsize=8")
    assert "model.patchsize: " in message and "patch_size" in message


def test_tokenizer_that_does_not_exist(pretrain_error, tmp_path):
    settings = (f"method.target.{key}" for key in ("name=tokens", f"tokenizer={tmp_path / 'none'}"))
    message = pretrain_error("--set", "method.name=beit", *(word for one in settings for word in ("--set", one)))
    assert f"method.target.tokenizer: {tmp_path / 'none'}: no such folder" in message


def test_unknown_recipe(pretrain_error):
    assert "demo_emae" in pretrain_error(recipe="demo_eame")


def test_global_batch_that_ranks_cannot_share(pretrain_error):
    message = pretrain_error("--set", "data.global_batch=50")
    assert "data.global_batch: 50 " in message and "engine.micro_batch" in message


def test_deepspeed_config_that_contradicts_the_recipe(pretrain_error, tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"train_batch_size": 7}')
    message = pretrain_error("--deepspeed_config", path)
    assert f"{path}: train_batch_size is 7" in message and "data.global_batch is 16" in message


def test_value_that_deepspeed_rejects(pretrain_error, tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": "many"}}')
    message = pretrain_error("--deepspeed_config", path)
    assert "--deepspeed_config: " in message and "reduce_bucket_size: " in message


def test_data_directory_without_manifest(pretrain_error, tmp_path):
    (tmp_path / "data").mkdir()
    message = pretrain_error(data=tmp_path / "data")
    assert "manifest.json" in message and "python -m data_prep" in message


def test_missing_data_directory(pretrain_error, tmp_path):
    assert "nowhere" in pretrain_error(data=tmp_path / "nowhere")


def test_shard_with_wrong_checksum(pretrain_error, shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = tar_path(copy, read_manifest(copy).shards[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert path.name in pretrain_error(data=copy)


def test_run_directory_with_other_files(shards, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    message = error_line("pretrain", "demo_emae", "--data", shards, "--run", tmp_path)
    assert f"--run {tmp_path}: " in message
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_run_of_another_recipe_or_other_data(run, other_shards):
    run.train(1, train__steps=2)
    before = run.metrics()
    message = error_line(*run.arguments(train__steps=4, optim__base_lr=1e-5)[2:])
    assert "optim.base_lr was " in message and ", is 1e-05" in message
    run.shards = other_shards
    message = error_line(*run.arguments(train__steps=4)[2:])
    assert "step-00000002: " in message and "--data" in message
    assert run.metrics() == before


def test_reconstruct_without_a_run(shards, tmp_path):
    out = tmp_path / "x.png"
    message = error_line("reconstruct", tmp_path / "x", "--images", shards, "--out", out)
    assert f"{tmp_path / 'x'}: " in message and not out.exists()


def test_reconstruct_without_readable_images(run, tmp_path):
    run.train(1, train__steps=1)
    folder, out = tmp_path / "text", tmp_path / "out.png"
    folder.mkdir()
    (folder / "photo.jpg").write_text("<html>not found</html>")
    assert f"--images {folder}: " in error_line("reconstruct", run.directory, "--images", folder, "--out", out)
    assert not out.exists()
