"""k-NN and the probe as processes: the same on two ranks, and after being killed."""

import json
import os
import signal
import time
from subprocess import PIPE

import pytest
import torch
from forkserver import ForkedProcess
from runs import Run, environment, rank_environments

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.evals.knn import knn
from pipeline.evals.online_knn import OnlineKnn
from pipeline.recipe import load_recipe
from pipeline.report.figures import loss_figure
from pipeline.report.history import read_history
from pipeline.report.page import report
from pipeline.weights.run import load_run

STEPS = 150  # it is killed after the tenth
TINY = ("model.width=32", "model.depth=2", "data.image_size=32", "model.patch_size=8")


@pytest.fixture
def one_thread(kept_environment):
    """As the ranks that are started here have one: sums are then the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "recipe.yaml").write_text(load_recipe("demo_emae", TINY).to_yaml())
    return f"random:{tmp_path / 'recipe.yaml'}"


def started(ranks: int, *arguments, module: str = "pipeline") -> list[ForkedProcess]:
    """A process per rank, each with an output of its own."""
    return [
        ForkedProcess(["-m", module, *arguments], env=environment(**rank), stdout=PIPE, stderr=PIPE)
        for rank in rank_environments(ranks)
    ]


def finished(processes: list[ForkedProcess]) -> str:
    """What rank 0 printed; the others print nothing."""
    first, *others = printed(processes)
    assert not any(others)
    return first


def printed(processes: list[ForkedProcess]) -> list[str]:
    """What each rank printed."""
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [out for out, _ in outputs]


def test_knn_counts_the_same_samples_right_on_one_rank_and_on_two(weights, labelled_sets, kept_environment):
    places = [weights, *map(str, labelled_sets)]
    one = knn(*places, batch=16, block=8)
    ranks = [json.loads(text) for text in printed(started(2, *places, module="small_blocks"))]
    assert [rank["result"] for rank in ranks] == [one, one]
    assert [rank["batches"] for rank in ranks] == [2 + 1, 2 + 2]  # of 60 images and of 42
    assert {row["top1"]["total"] for row in one["knn"]} == {42}


def test_a_probe_on_two_ranks_that_was_killed_ends_as_one_that_was_not_on_one(
    weights, labelled_sets, tmp_path, one_thread
):
    train, val = map(str, labelled_sets)
    settings = {
        "data.global_batch": 32,
        "data.holdout": 0.2,
        "engine.micro_batch": 8,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.checkpoint_every": 10,
        "probe.warmup_epochs": 1,
    }
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    command = ["linprobe", "--weights", weights, "--data", train, "--val", val, *sets, "--run"]
    assert main([*command, str(tmp_path / "one")]) == 0
    killed = started(2, *command, tmp_path / "two")
    while not (tmp_path / "two/checkpoints/latest").exists():
        assert all(process.poll() is None for process in killed)
        time.sleep(0.005)
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
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert [[line[key] for key in losses] for line in one] == [[line[key] for key in losses] for line in two]
    one, two = (json.loads((tmp_path / run / "accuracy.json").read_text()) for run in ("one", "two"))
    assert one == two
    assert one["top1"]["total"] == 42
    assert one["train"]["samples"] + one["held_out"]["samples"] == 60


def test_a_probe_has_a_report_and_stops_on_all_ranks_where_it_cannot_write(
    labelled_sets, tmp_path, one_thread
):
    train, val = map(str, labelled_sets)
    run = tmp_path / "run"
    command = ["linprobe", "--weights", "pixels:16", "--center-crops", "--data", train, "--val", val]
    command += ["--set=data.global_batch=16", "--set=data.holdout=0.2", "--set=train.steps=4"]
    command += ["--set=train.log_every=1", "--lr", "0.1", "1", "--run", str(run)]
    assert main(command) == 0
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


def test_two_ranks_that_share_their_weights_measure_the_knn_that_one_measures(labelled_sets, tmp_path):
    """While the run trains, and of its checkpoint."""
    run = Run(labelled_sets[0], tmp_path / "run")
    lines = run.train(2, engine__zero_stage=3, train__steps=4, evals__knn_every=2)
    measured = {line["step"]: line["knn_top1"] for line in lines if "knn_top1" in line}
    assert measured.keys() == {2, 4}
    recipe, method, step = load_run(run.directory)
    alone = OnlineKnn(recipe, ShardReader(run.shards), method, DistInfo(0, 1, 0, 1, torch.device("cpu"), 1))
    assert step == 4 and measured[4] == alone(lambda: None)["knn_top1"]
