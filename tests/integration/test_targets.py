"""Runs that predict tokens or histograms: they train, resume bit-identically, and keep their tokenizer."""

import os
import tarfile
from pathlib import Path

import forkserver
import pytest
from pytest import approx
from runs import Run
from small_codebook import save_codebook
from test_killed_runs import without_timing

TARGETS = {  # settings; "tokens" adds those of a tokenizer
    "mae, hog": {"model.patch_size": 8, "method.target.name": "hog"},
    "mae, tokens": {"model.patch_size": 4},
    "beit, tokens": {"model.patch_size": 4},
    "lomar, tokens": {"model.patch_size": 4},
}


def settings_of(title: str, folder: Path) -> dict[str, object]:
    method, _, target = title.partition(", ")
    settings = {"method.name": method, **TARGETS[title]}
    if target == "tokens":
        settings |= save_codebook(folder)
    return {key.replace(".", "__"): value for key, value in settings.items()}


def test_killed_run_keeps_its_tokenizer_and_means_over_steps(run, other_run, tmp_path):
    folder = tmp_path / "tokenizer"
    settings = {**settings_of("beit, tokens", folder), "train__steps": 7, "train__log_every": 3}
    uninterrupted = other_run.train(1, **settings)
    run.kill_at(1, "step 6", **settings)  # the checkpoint is of step 4, the line of steps 4 to 6
    save_codebook(folder, seed=1)
    assert run.start(1, **settings).wait() == 2
    assert "method.target.tokenizer: " in run.output.read_text() and "other weights" in run.output.read_text()
    save_codebook(folder)
    assert without_timing(run.train(1, **settings)) == without_timing(uninterrupted)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A shard set of 2,000 images of CIFAR-10."""
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR is not set")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(Path(os.environ["CIFAR10_DIR"]) / "train.tar") as archive:
        members = [member for member in archive if member.isfile()]
        archive.extractall(folder, members[:: len(members) // 2000], filter="data")
    built = forkserver.run(["-m", "data_prep", "folder", folder / "train", folder / "set"])
    assert built.returncode == 0, built.stderr
    return folder / "set"


@pytest.mark.soak
@pytest.mark.parametrize("title", TARGETS)
def test_targets_train_on_cifar10_on_every_number_of_ranks(cifar, tmp_path, title):
    settings = {**settings_of(title, tmp_path / "tokenizer"), "train__steps": 240, "train__checkpoint_every": 50}
    one, two, killed = (Run(cifar, tmp_path / name) for name in ("one", "two", "killed"))
    uninterrupted = two.train(2, **settings, engine__zero_stage=3)
    losses = [line["loss"] for line in uninterrupted]
    print(f"{title}: loss from {losses[0]:.3f} to {sum(losses[-20:]) / 20:.3f}")
    assert sum(losses[-20:]) / 20 < 0.9 * losses[0]
    killed.kill_at(2, "step 120", **settings, engine__zero_stage=3)
    assert without_timing(killed.train(2, **settings, engine__zero_stage=3)) == without_timing(uninterrupted)
    assert [line["loss"] for line in one.train(1, **settings)][:40] == approx(losses[:40], rel=1e-3)
