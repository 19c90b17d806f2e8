"""A run detects any damage to its newest checkpoint, and resumes from the previous one.

Real runs, too long for every day. tests/pipeline/test_checkpoint.py tests the protocol on disk.
"""

import shutil

import pytest
from runs import Run

from pipeline.train import checkpoint

STEPS = 12
RANKS = 2
FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "engine.json", "state.json", "weights.safetensors"]
SETTINGS = {"train__steps": STEPS, "engine__zero_stage": 2, "train__ema_decay": 0.9}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    run = Run(shards, tmp_path_factory.mktemp("finished") / "run")
    run.train(RANKS, **SETTINGS)
    assert checkpoint.checkpoint_steps(run.directory / "checkpoints") == [8, STEPS]
    return run


@pytest.mark.soak
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("file", [*FILES, "weights_ema.safetensors"])
def test_damaged_checkpoint_is_not_used(run, finished, file, damage):
    shutil.copytree(finished.directory, run.directory)
    newest = run.directory / "checkpoints" / checkpoint.checkpoint_name(STEPS)
    assert {path.name for path in newest.iterdir()} == {*FILES, "weights_ema.safetensors"}
    damage(newest / file)
    run.train(RANKS, **SETTINGS)
    assert f"{newest.name} is damaged" in run.output.read_text()
    assert run.losses() == finished.losses()
    expected = finished.directory / "checkpoints" / newest.name / "weights.safetensors"
    assert (newest / "weights.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
def test_resume_does_not_depend_on_latest(run, finished, damage):
    shutil.copytree(finished.directory, run.directory)
    damage(run.directory / "checkpoints" / "latest")
    run.train(RANKS, **SETTINGS)
    assert run.losses() == finished.losses()


@pytest.mark.soak
def test_run_with_only_damaged_checkpoints_is_an_error(run, finished):
    shutil.copytree(finished.directory, run.directory)
    for path in (run.directory / "checkpoints").glob("*/engine.json"):
        path.unlink()
    process = run.start(RANKS, **SETTINGS)
    assert process.wait(120) == 2
    assert f"{run.directory / 'checkpoints'}: every checkpoint is damaged" in run.output.read_text()
    assert run.losses() == finished.losses()
