"""A run continues on another number of ranks, at another ZeRO stage, with another micro batch."""

import json

import pytest
from pytest import approx
from runs import Run

STEPS = 12
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    """The losses on two ranks, ZeRO 1, never stopped; large enough a rate that every detail would show."""
    run = Run(shards, tmp_path_factory.mktemp("uninterrupted") / "run")
    return [line["loss"] for line in run.train(2, train__steps=STEPS, **EAGER)]


EAGER = {"optim__base_lr": 0.05, "optim__warmup_steps": 0, "optim__weight_decay": 0.5}

HISTORIES = {  # (ranks, ZeRO stage, micro batch) of a start and the next
    "ranks 2, 1, 2 and ZeRO 1, 3, 2": [(2, 1, 4), (1, 3, 4), (2, 2, 2)],
    "ZeRO 0, 1, 0": [(1, 0, 4), (2, 1, 8), (2, 0, 4)],
}


@pytest.mark.parametrize(
    "name", ["ranks 2, 1, 2 and ZeRO 1, 3, 2", pytest.param("ZeRO 0, 1, 0", marks=pytest.mark.soak)]
)
def test_the_losses_are_the_uninterrupted_runs_whatever_ranks_and_stages_came_in_between(
    run, uninterrupted, name
):
    steps = range(4, STEPS + 1, 4)
    for (ranks, stage, micro_batch), until in zip(HISTORIES[name], steps, strict=True):
        # Told by when it is to stop, a run would schedule its rate for that; it is killed instead.
        settings = {
            "train__steps": STEPS,
            "engine__zero_stage": stage,
            "engine__micro_batch": micro_batch,
            **EAGER,
        }
        if until < STEPS:
            run.kill_at(ranks, f"step {until + 1}", **settings)
        else:
            run.train(ranks, **settings)
    starts = json.loads((run.directory / "environment.json").read_text())["starts"]
    begun = [start["step"] for start in starts]
    assert begun[0] == 0 and begun == sorted({*begun}) and begun[-1] < STEPS  # each has trained
    took_place = [(start["world_size"], start["zero_stage"]) for start in starts]
    assert took_place == [(ranks, stage) for ranks, stage, _ in HISTORIES[name]]
    assert [line["loss"] for line in run.metrics()] == approx(uninterrupted, rel=TOLERANCE)
