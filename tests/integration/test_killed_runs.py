"""What a run computes does not depend on being killed."""

import json
import random
import time

import pytest
import torch
from pytest import approx

from pipeline.io.metrics_file import TIMING_COLUMNS
from pipeline.weights.run import load_run

STEPS = 12


def lasting(lines):
    """The lines without what says how fast it went, and when."""
    return [{name: line[name] for name in line.keys() - TIMING_COLUMNS} for line in lines]


def test_killed_anywhere_and_started_again_it_ends_with_the_same_losses_and_averages_to_the_bit(
    run, other_run
):
    settings = {"train__steps": STEPS, "data__trace": True, "train__ema_decay": 0.8}
    undisturbed = other_run.train(2, **settings)
    checkpoints = run.directory / "checkpoints"
    late = random.Random(time.time_ns()).randint(6, STEPS)
    for moment in ("step 3", "checkpoint 4", f"step {late}"):
        run.kill_at(2, moment, **settings)
        assert any(checkpoints.glob("*.partial/rank-*")) == (moment == "checkpoint 4")
    run.train(2, **settings)
    assert lasting(run.metrics()) == lasting(undisturbed)
    for rank in (0, 1):
        name = f"samples/rank-{rank}.txt"
        assert (run.directory / name).read_text() == (other_run.directory / name).read_text()
    averages, expected = (load_run(r.directory, ema=True).method.state_dict() for r in (run, other_run))
    assert all(torch.equal(averages[name], expected[name]) for name in expected)
    weights = load_run(run.directory).method.state_dict()
    assert not torch.equal(weights["encoder.cls_token"], averages["encoder.cls_token"])


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_ten_times_at_random_moments_the_losses_are_the_same_to_the_bit(run, other_run, stage):
    settings = {"train__steps": 120, "engine__zero_stage": stage}
    undisturbed = other_run.train(2, **settings)
    checkpoints = run.directory / "checkpoints"
    seed = time.time_ns()
    chance = random.Random(seed)
    print(f"seed {seed}")
    for kill in range(10):
        process = run.start(2, **settings)
        reached = last_step(run)
        until = 10 * kill + chance.randint(1, 10)
        if kill % 2:  # while a checkpoint is written, at a random file of it
            part = chance.choice(["", "rank-00000*", "rank-00001*", "engine.json", "weights*"])
            run.kill_when(process, lambda part=part: any(checkpoints.glob(f"*.partial/{part}")))
        else:
            run.wait_for(process, lambda reached=reached, until=until: last_step(run) >= max(until, reached))
            time.sleep(chance.uniform(0, 0.2))
            run.kill_when(process, lambda: True)
    run.train(2, **settings)
    assert lasting(run.metrics()) == lasting(undisturbed)


def last_step(run) -> int:
    """Logged so far; a last line may be cut."""
    path = run.directory / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return max([0, *(json.loads(line)["step"] for line in whole)])


def test_a_logged_window_that_a_kill_cut_in_two_has_the_same_mean(run, other_run):
    settings = {"train__steps": STEPS, "train__log_every": 3}
    undisturbed = other_run.train(1, **settings)
    run.kill_at(1, "step 6", **settings)  # the checkpoint is of step 4, the window of steps 4 to 6
    run.train(1, **settings)
    assert lasting(run.metrics()) == lasting(undisturbed)


def test_a_finished_run_started_again_changes_nothing(run):
    first = run.train(1, train__steps=4)
    assert run.train(1, train__steps=4) == first


def test_a_longer_schedule_continues_where_the_run_stands(run):
    run.train(1, train__steps=4, optim__warmup_steps=0)
    lines = run.train(1, train__steps=6, optim__warmup_steps=0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["samples"] == 6 * 16 and lines[-1]["lr"] == approx(run_rate(5, 6))


def run_rate(step, total):
    from pipeline.recipe import load_recipe
    from pipeline.train.lr_schedule import learning_rate

    recipe = load_recipe("demo_emae", ["data.global_batch=16"])
    return learning_rate(step, total, 0, recipe.lr)
