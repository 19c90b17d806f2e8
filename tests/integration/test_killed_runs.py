"""The results of a run do not depend on how often it was killed."""

import json
import random
import time

import pytest
import torch
from pytest import approx

from pipeline.io.metrics_file import TIMING_COLUMNS
from pipeline.recipe import load_recipe
from pipeline.train.lr_schedule import learning_rate
from pipeline.weights.run import load_run

STEPS = 12


def without_timing(lines):
    return [{name: line[name] for name in line.keys() - TIMING_COLUMNS} for line in lines]


def test_killed_run_has_bit_identical_losses_and_ema(run, other_run):
    settings = {"train__steps": STEPS, "data__trace": True, "train__ema_decay": 0.8}
    uninterrupted = other_run.train(2, **settings)
    checkpoints = run.directory / "checkpoints"
    late = random.Random(time.time_ns()).randint(6, STEPS)
    for moment in ("step 3", "checkpoint 4", f"step {late}"):
        run.kill_at(2, moment, **settings)
        assert any(checkpoints.glob("*.partial/rank-*")) == (moment == "checkpoint 4")
    run.train(2, **settings)
    assert without_timing(run.metrics()) == without_timing(uninterrupted)
    for rank in (0, 1):
        name = f"samples/rank-{rank}.txt"
        assert (run.directory / name).read_text() == (other_run.directory / name).read_text()
    ema, expected = (load_run(r.directory, ema=True).method.state_dict() for r in (run, other_run))
    assert all(torch.equal(ema[name], expected[name]) for name in expected)
    weights = load_run(run.directory).method.state_dict()
    assert not torch.equal(weights["encoder.cls_token"], ema["encoder.cls_token"])


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ten_random_kills_leave_the_losses_bit_identical(run, other_run, stage):
    settings = {"train__steps": 120, "engine__zero_stage": stage}
    uninterrupted = other_run.train(2, **settings)
    checkpoints = run.directory / "checkpoints"
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"seed {seed}")
    for kill in range(10):
        process = run.start(2, **settings)
        reached = last_step(run)
        target = max(10 * kill + rng.randint(1, 10), reached)
        if kill % 2:  # while a random file of a checkpoint is written
            part = rng.choice(["", "rank-00000*", "rank-00001*", "engine.json", "weights*"])
            run.kill_when(process, lambda part=part: any(checkpoints.glob(f"*.partial/{part}")))
        else:
            run.wait_for(process, lambda target=target: last_step(run) >= target)
            time.sleep(rng.uniform(0, 0.2))
            run.kill_when(process, lambda: True)
    run.train(2, **settings)
    assert without_timing(run.metrics()) == without_timing(uninterrupted)


def last_step(run) -> int:
    """Return the last logged step; the last line may be incomplete."""
    path = run.directory / "metrics.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return max([0, *(json.loads(line)["step"] for line in lines)])


def test_finished_run_started_again_changes_nothing(run):
    first = run.train(1, train__steps=4)
    assert run.train(1, train__steps=4) == first


def test_run_can_be_extended(run):
    run.train(1, train__steps=4, optim__warmup_steps=0)
    assert "instead of" not in run.output.read_text()
    lines = run.train(1, train__steps=6, optim__warmup_steps=0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    peak = load_recipe("demo_emae", ["data.global_batch=16"]).peak_lr
    assert lines[-1]["samples"] == 6 * 16 and lines[-1]["lr"] == approx(learning_rate(5, 6, 0, peak))
    (warning,) = (line for line in run.output.read_text().splitlines() if "6 steps instead of 4" in line)
    assert f"after step 4 is {learning_rate(4, 6, 0, peak):.3g} instead of 0 " in warning
