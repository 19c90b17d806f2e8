"""Invalid input of knn, linprobe and finetune gives one error line, exit code 2 and no run directory."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.__main__ import main
from pipeline.weights.encoder import load_encoder
from tests.conftest import build

COMMANDS = {"knn": [], "linprobe": ["--run", "RUN"], "finetune": ["--run", "RUN"]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory, labelled_sets) -> dict[str, str]:
    """Labeled sets, train and val, and others that do not fit them."""
    folder = tmp_path_factory.mktemp("sets")
    for place in ("plain", "zoo/lion", "zoo/tiger", "alone/cat"):
        (folder / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (len(place),) * 3).save(folder / place / f"{number}.png")
    train, val = labelled_sets
    others = {name: str(build(folder / name, folder / f"{name}-set")) for name in ("plain", "zoo", "alone")}
    return {"train": str(train), "val": str(val), **others}


@pytest.fixture(scope="module")
def misshapen_weights(tmp_path_factory) -> str:
    """An exported encoder with one tensor of a wrong shape."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    state = load_encoder("random:demo_emae").vit.state_dict()
    save_file({**state, "norm.weight": torch.zeros(3)}, path, {"heads": "4"})
    return str(path)


@pytest.fixture(scope="module")
def infinite_weights(tmp_path_factory) -> str:
    """An exported encoder with one infinite value."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    state = load_encoder("random:demo_emae").vit.state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 4] = torch.inf
    save_file(state, path, {"heads": "4"})
    return str(path)


@pytest.fixture
def error_of(tmp_path, capsys, kept_environment):
    """Runs a command that has to fail; returns its error line."""

    def run(command: str, weights: str, train: str, val: str, *more: str) -> str:
        sets = ["--weights", weights, "--data", train, "--val", val]
        run = [str(tmp_path / "run") if word == "RUN" else word for word in COMMANDS[command]]
        recipe = ["finetune_tiny"] if command == "finetune" else []
        assert main([command, *recipe, *sets, *run, *more]) == 2
        log = capsys.readouterr().err
        (line,) = (line for line in log.splitlines() if line.startswith("pipeline: "))
        assert line.startswith("pipeline: error: ") and "Traceback" not in log
        assert not (tmp_path / "run").exists()
        return line

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ("plain", "val", ["--data PLAIN: ", "no labels"]),
        ("train", "plain", ["--val PLAIN: ", "no labels"]),
        ("alone", "alone", ["--data ALONE: ", "'cat'"]),
        ("train", "zoo", ["--val ZOO: ", "--data TRAIN", "6 missing: ", "2 unexpected: 'lion', 'tiger'"]),
        ("train", "train", ["--val TRAIN: shares shards with --data TRAIN"]),
    ],
)
def test_sets_that_do_not_fit_together_are_rejected(command, train, val, words, error_of, sets):
    error = error_of(command, "random:demo_emae", sets[train], sets[val])
    for name, path in sets.items():
        error = error.replace(path, name.upper())
    assert all(word in error for word in words), error


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_another_shape_are_rejected(command, error_of, sets, misshapen_weights):
    error = error_of(command, misshapen_weights, sets["train"], sets["val"])
    assert f"--weights {misshapen_weights}: " in error and "norm.weight" in error and "(3,)" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_not_finite_are_rejected(command, error_of, sets, infinite_weights):
    error = error_of(command, infinite_weights, sets["train"], sets["val"])
    assert f"--weights {infinite_weights}: blocks.1.mlp.fc1.weight has NaN or infinite" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_image_size_that_patches_do_not_divide_is_rejected(command, error_of, sets):
    size = ["--set", "data.image_size=36"] if command == "finetune" else ["--image-size", "36"]
    error = error_of(command, "random:demo_emae", sets["train"], sets["val"], *size)
    assert "random:demo_emae: " in error and "8 px" in error and "36" in error


def test_interpolated_positions_are_logged(sets, capsys, kept_environment):
    arguments = ["--weights", "random:demo_emae", "--data", sets["train"], "--val", sets["val"]]
    assert main(["knn", *arguments, "--image-size", "32"]) == 0
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "interpolat" in output.err and "32" in output.err
    assert "42 validation images, 6 classes" in output.out


@pytest.mark.parametrize("command", ["knn", "linprobe"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_shard_that_differs_from_manifest_is_rejected(command, part, error_of, sets, tmp_path):
    damaged = shutil.copytree(sets[part], tmp_path / "damaged")
    shard = min(damaged.rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    chosen = {"train": sets["train"], "val": sets["val"], part: str(damaged)}
    assert shard.name in error_of(command, "pixels:24", chosen["train"], chosen["val"])
