"""What `knn`, `linprobe` and `finetune` cannot judge or train on is one clear line; nothing is written."""

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
    """Labelled sets to learn from and to be judged on, and others that cannot stand for them."""
    folder = tmp_path_factory.mktemp("sets")
    for place in ("plain", "zoo/lion", "zoo/tiger", "alone/cat"):
        (folder / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (len(place),) * 3).save(folder / place / f"{number}.png")
    train, val = labelled_sets
    others = {name: str(build(folder / name, folder / f"{name}-set")) for name in ("plain", "zoo", "alone")}
    return {"train": str(train), "val": str(val), **others}


@pytest.fixture(scope="module")
def narrower(tmp_path_factory) -> str:
    """An exported encoder, one tensor of which is of another shape."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    state = load_encoder("random:demo_emae").vit.state_dict()
    save_file({**state, "norm.weight": torch.zeros(3)}, path, {"heads": "4"})
    return str(path)


@pytest.fixture
def complaint(tmp_path, capsys, kept_environment):
    """Runs a command that must refuse; returns its line, and checks that no run directory is left."""

    def refused(command: str, weights: str, train: str, val: str, *more: str) -> str:
        places = ["--weights", weights, "--data", train, "--val", val]
        run = [str(tmp_path / "run") if word == "RUN" else word for word in COMMANDS[command]]
        recipe = ["finetune_tiny"] if command == "finetune" else []
        assert main([command, *recipe, *places, *run, *more]) == 2
        said = capsys.readouterr().err
        (line,) = (line for line in said.splitlines() if line.startswith("pipeline: "))
        assert line.startswith("pipeline: error: ") and "Traceback" not in said
        assert not (tmp_path / "run").exists()
        return line

    return refused


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--data", "--val"])
def test_labels_that_are_missing(command, option, complaint, sets):
    chosen = {"--data": sets["train"], "--val": sets["val"], option: sets["plain"]}
    said = complaint(command, "random:demo_emae", chosen["--data"], chosen["--val"])
    assert f"{option} {sets['plain']}: its samples have no labels" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_single_class(command, complaint, sets):
    said = complaint(command, "random:demo_emae", sets["alone"], sets["alone"])
    assert f"--data {sets['alone']}: all its samples are of one class, 'cat': nothing to tell apart" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_classes_that_are_others(command, complaint, sets):
    said = complaint(command, "random:demo_emae", sets["train"], sets["zoo"])
    assert f"--val {sets['zoo']}: its classes are not those of --data {sets['train']}: 6 are missing" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_of_another_shape(command, complaint, sets, narrower):
    said = complaint(command, narrower, sets["train"], sets["val"])
    assert f"--weights {narrower}: do not fit a vision transformer: norm.weight is (3,)" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_an_image_size_that_the_patches_do_not_fit(command, complaint, sets):
    size = ["--set", "data.image_size=36"] if command == "finetune" else ["--image-size", "36"]
    said = complaint(command, "random:demo_emae", sets["train"], sets["val"], *size)
    assert "random:demo_emae: patches of 8 px, and 36 px images are no multiple" in said


def test_another_image_size_is_said_in_one_line(sets, capsys, kept_environment):
    places = ["--weights", "random:demo_emae", "--data", sets["train"], "--val", sets["val"]]
    assert main(["knn", *places, "--image-size", "32"]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "its positions are interpolated to 32 px" in said.err
    assert "42 to be judged, 6 classes" in said.out


@pytest.mark.parametrize("command", ["knn", "linprobe"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_bytes_that_are_not_the_manifests(command, part, complaint, sets, tmp_path):
    damaged = shutil.copytree(sets[part], tmp_path / "damaged")
    shard = min(damaged.rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    chosen = {"train": sets["train"], "val": sets["val"], part: str(damaged)}
    said = complaint(command, "pixels:24", chosen["train"], chosen["val"])
    assert shard.name in said
