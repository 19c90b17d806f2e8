"""A finished run directory has the files of docs/architecture.md, and other commands can read it."""

import json

import pytest
import torch
from forkserver import run as fork
from PIL import Image
from runs import environment as process_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.io.metrics_file import TIMING_COLUMNS
from pipeline.recipe import load_recipe
from pipeline.weights.run import load_run


@pytest.mark.parametrize("stage", [0, 3])
def test_run_writes_all_files_and_its_weights_load(run, stage, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"train__wandb": "tests", "train__profile_steps": "[2,9]", "data__trace": True}
    lines = run.train(2, train__steps=4, engine__zero_stage=stage, **settings)
    directory = run.directory

    assert load_recipe(directory / "recipe.yaml").engine.zero_stage == stage
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]

    expected = {"step", "epoch", "samples", "loss", "reconstruction", "consistency", "lr", "grad_norm"}
    assert expected | {"skipped", "undecodable"} | TIMING_COLUMNS == lines[0].keys()
    assert [line["samples"] for line in lines] == [16, 32, 48, 64]
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])

    assert [path.name for path in (directory / "profile").iterdir()] == ["steps-00000002-00000004.json.gz"]
    assert len(list((directory / "wandb").glob("offline-run-*/run-*.wandb"))) == 1

    traces = [(directory / "samples" / f"rank-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    for step in range(4):
        assert [sum(line.startswith(f"{step} ") for line in trace) for trace in traces] == [8, 8]

    loaded = load_run(directory)
    assert loaded.step == 4
    assert all(torch.isfinite(weight).all() for weight in loaded.method.state_dict().values())
    assert Image.open(directory / "reconstructions" / "step-00000004.png").width > 100

    out = tmp_path / "picture.png"
    for arguments in (["reconstruct", directory, "--images", photographs, "--out", out], ["report", directory]):
        assert fork(["-m", "pipeline", *arguments], env=process_environment()).returncode == 0
    assert Image.open(out).format == "PNG"
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "://" not in page  # base64 has no colon
    assert "<h2>Wall-clock time</h2>" in page and "<h2>Reconstructions</h2>" in page
