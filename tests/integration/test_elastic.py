"""A run resumes on another number of ranks, at another ZeRO stage, and with another micro batch."""

import json

import pytest
from pytest import approx
from runs import Run

STEPS = 12
TOLERANCE = 1e-5
LARGE_UPDATES = {"optim__base_lr": 0.05, "optim__warmup_steps": 0, "optim__weight_decay": 0.5}
"""Updates so large that a wrong detail of the state would change the losses."""
HISTORIES = {  # (ranks, ZeRO stage, micro batch) of one start after the other
    "ranks 2, 1, 2 and ZeRO 1, 3, 2": [(2, 1, 4), (1, 3, 4), (2, 2, 2)],
    "ZeRO 0, 1, 0": [(1, 0, 4), (2, 1, 8), (2, 0, 4)],
}


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    """The losses of an uninterrupted run on two ranks with ZeRO 1."""
    run = Run(shards, tmp_path_factory.mktemp("uninterrupted") / "run")
    return [line["loss"] for line in run.train(2, train__steps=STEPS, **LARGE_UPDATES)]


@pytest.mark.parametrize(
    "name", ["ranks 2, 1, 2 and ZeRO 1, 3, 2", pytest.param("ZeRO 0, 1, 0", marks=pytest.mark.soak)]
)
def test_losses_do_not_depend_on_ranks_and_zero_stage(run, uninterrupted, name):
    for (ranks, stage, micro_batch), end in zip(HISTORIES[name], range(4, STEPS + 1, 4), strict=True):
        settings = {
            "train__steps": STEPS,
            "engine__zero_stage": stage,
            "engine__micro_batch": micro_batch,
            **LARGE_UPDATES,
        }
        # Killed, because a run with fewer train.steps would have another learning rate schedule.
        if end < STEPS:
            run.kill_at(ranks, f"step {end + 1}", **settings)
        else:
            run.train(ranks, **settings)
    starts = json.loads((run.directory / "environment.json").read_text())["starts"]
    first_steps = [start["step"] for start in starts]
    assert first_steps[0] == 0 and first_steps == sorted({*first_steps}) and first_steps[-1] < STEPS
    layouts = [(start["world_size"], start["zero_stage"]) for start in starts]
    assert layouts == [(ranks, stage) for ranks, stage, _ in HISTORIES[name]]
    assert [line["loss"] for line in run.metrics()] == approx(uninterrupted, rel=TOLERANCE)
