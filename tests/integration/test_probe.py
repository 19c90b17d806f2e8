"""k-NN and the linear probe have the same results on two ranks as on one, and after a kill."""

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
from pipeline.report.figures import plot_loss
from pipeline.report.history import read_history
from pipeline.report.page import report
from pipeline.weights.run import load_run

STEPS = 80  # it is killed after the tenth
TINY = ("model.width=32", "model.depth=2", "data.image_size=32", "model.patch_size=8")


@pytest.fixture
def one_thread(kept_environment):
    """Compute with one thread, as the ranks that the test starts, so that sums are bit-identical."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "recipe.yaml").write_text(load_recipe("demo_emae", TINY).to_yaml())
    return f"random:{tmp_path / 'recipe.yaml'}"


def start(ranks: int, *arguments, module: str = "pipeline") -> list[ForkedProcess]:
    """Start a process per rank, each with its own stdout and stderr."""
    return [
        ForkedProcess(["-m", module, *arguments], env=environment(**rank), stdout=PIPE, stderr=PIPE)
        for rank in rank_environments(ranks)
    ]


def outputs(processes: list[ForkedProcess]) -> list[str]:
    """Wait for the processes and return the stdout of each."""
    streams = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), streams
    return [stdout for stdout, _ in streams]


def test_knn_has_equal_counts_on_one_rank_and_on_two(weights, labelled_sets, kept_environment):
    arguments = [weights, *map(str, labelled_sets)]
    one = knn(*arguments, batch=16, block=8)
    ranks = [json.loads(text) for text in outputs(start(2, *arguments, module="small_blocks"))]
    assert [rank["result"] for rank in ranks] == [one, one]
    assert [rank["batches"] for rank in ranks] == [2 + 1, 2 + 2]  # of 60 images and of 42
    assert {row["top1"]["total"] for row in one["knn"]} == {42}


def test_killed_probe_on_two_ranks_equals_one_on_one_rank(weights, labelled_sets, tmp_path, one_thread):
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
    killed = start(2, *command, tmp_path / "two")
    while not (tmp_path / "two/checkpoints/latest").exists():
        assert all(process.poll() is None for process in killed)
        time.sleep(0.005)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "two/results.json").exists()
    _, *others = outputs(start(2, *command, tmp_path / "two"))
    assert not any(others)  # only rank 0 prints the result
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    columns = [key for key in one[0] if key.startswith("loss")]
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert [[line[key] for key in columns] for line in one] == [[line[key] for key in columns] for line in two]
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert one == two
    assert one["top1"]["total"] == 42
    assert one["train"]["samples"] + one["held_out"]["samples"] == 60


def test_probe_has_a_report_and_stops_if_it_cannot_write(labelled_sets, tmp_path, one_thread):
    train, val = map(str, labelled_sets)
    run = tmp_path / "run"
    command = ["linprobe", "--weights", "pixels:16", "--center-crops", "--data", train, "--val", val]
    command += ["--set=data.global_batch=16", "--set=data.holdout=0.2", "--set=train.steps=4"]
    command += ["--set=train.log_every=1", "--lr", "0.1", "1", "--run", str(run)]
    assert main(command) == 0
    history = read_history(run)
    assert history.loss_columns == ["loss", "loss_0.1", "loss_1"]
    assert len(history.column("lr")[1]) == 4 and plot_loss([history]).axes
    assert "of 4 steps" in report([run]).read_text()

    (run / "results.json.new").mkdir()  # the temporary name
    processes = start(2, *command)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    lines = [line for text in errors for line in text.splitlines() if "error" in line or "Traceback" in line]
    assert len(lines) == 1 and "results.json.new" in lines[0], errors


def test_knn_during_training_on_two_ranks_equals_one_rank(labelled_sets, tmp_path):
    """Of the weights that ZeRO-3 shards, and of the checkpoint."""
    run = Run(labelled_sets[0], tmp_path / "run")
    lines = run.train(2, engine__zero_stage=3, train__steps=4, evals__knn_every=2)
    accuracies = {line["step"]: line["knn_top1"] for line in lines if "knn_top1" in line}
    assert accuracies.keys() == {2, 4}
    recipe, method, step = load_run(run.directory)
    evaluate = OnlineKnn(recipe, ShardReader(run.shards), method, DistInfo(0, 1, 0, 1, torch.device("cpu"), 1))
    assert step == 4 and accuracies[4] == evaluate(lambda: None)["knn_top1"]
