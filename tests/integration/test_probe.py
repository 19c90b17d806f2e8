"""k-NN and the probe as processes: the same on two ranks, and after being killed."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from runs import Run

from pipeline.evals.knn import knn
from pipeline.recipe import load_recipe
from pipeline.report.figures import loss_figure
from pipeline.report.history import read_history
from pipeline.report.page import report

TINY = ("model.width=32", "model.depth=2", "data.image_size=32", "model.patch_size=8")


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "recipe.yaml").write_text(load_recipe("demo_emae", TINY).to_yaml())
    return f"random:{tmp_path / 'recipe.yaml'}"


def started(ranks: int, *arguments) -> list[subprocess.Popen]:
    """As torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fixed = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            env=fixed
            | {key: str(value) for key, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finished(processes: list[subprocess.Popen]) -> str:
    """What rank 0 printed."""
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert not any(out for out, _ in outputs[1:])
    return outputs[0][0]


def test_knn_counts_the_same_samples_right_on_one_rank_and_on_two(weights, labelled_sets, kept_environment):
    train, val = labelled_sets
    command = ["knn", "--weights", weights, "--data", train, "--val", val, "--json"]
    one = knn(weights, str(train), str(val))
    two = json.loads(finished(started(2, *command)))
    assert one == two
    assert {row["top1"]["total"] for row in one["knn"]} == {42}


@pytest.mark.soak
def test_a_probe_on_two_ranks_that_was_killed_ends_as_one_that_was_not_on_one(
    weights, labelled_sets, tmp_path
):
    train, val = labelled_sets
    settings = {
        "data.global_batch": 32,
        "data.holdout": 0.2,
        "engine.micro_batch": 8,
        "train.steps": 60,
        "train.log_every": 1,
        "train.checkpoint_every": 10,
        "probe.warmup_epochs": 1,
    }
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    command = ["linprobe", "--weights", weights, "--data", train, "--val", val, *sets, "--run"]
    finished(started(1, *command, tmp_path / "one"))
    killed = started(2, *command, tmp_path / "two")
    while not (tmp_path / "two/checkpoints/latest").exists():
        assert all(process.poll() is None for process in killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "two/accuracy.json").exists()
    finished(started(2, *command, tmp_path / "two"))
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    losses = [key for key in one[0] if key.startswith("loss")]
    assert [line["step"] for line in two] == list(range(1, 61))
    assert [[line[key] for key in losses] for line in one] == [[line[key] for key in losses] for line in two]
    one, two = (json.loads((tmp_path / run / "accuracy.json").read_text()) for run in ("one", "two"))
    assert one == two
    assert one["top1"]["total"] == 42
    assert one["train"]["samples"] + one["held_out"]["samples"] == 60


def test_a_probe_has_a_report_and_stops_on_all_ranks_where_it_cannot_write(labelled_sets, tmp_path):
    train, val = labelled_sets
    run = tmp_path / "run"
    command = ["linprobe", "--weights", "pixels:16", "--center-crops", "--data", train, "--val", val]
    command += ["--set=data.global_batch=16", "--set=data.holdout=0.2", "--set=train.steps=4"]
    command += ["--set=train.log_every=1", "--lr", 0.1, 1, "--run", run]
    finished(started(1, *command))
    history = read_history(run)
    assert history.losses == ["loss", "loss_0.1", "loss_1"]
    assert len(history.column("lr")[1]) == 4 and loss_figure([history]).axes
    assert "of 4 steps" in report([run]).read_text()

    (run / "accuracy.json.new").mkdir()  # in the way
    processes = started(2, *command)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    said = [line for text in errors for line in text.splitlines() if "error" in line or "Traceback" in line]
    assert len(said) == 1 and "accuracy.json.new" in said[0], errors


@pytest.mark.soak
def test_a_run_on_two_ranks_that_share_their_weights_measures_knn(labelled_sets, tmp_path, kept_environment):
    run = Run(labelled_sets[0], tmp_path / "run")
    lines = run.train(2, engine__zero_stage=3, train__steps=4, evals__knn_every=2)
    measured = {line["step"]: line["knn_top1"] for line in lines if "knn_top1" in line}
    assert measured.keys() == {2, 4}
    found = knn(str(run.directory), *map(str, labelled_sets), ks=[20])
    assert found["features"].endswith("step 4, class token")
