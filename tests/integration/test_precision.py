"""bf16 and fp16 learn what fp32 learns, to their precision, on every ZeRO stage."""

import pytest
import torch
from pytest import approx
from runs import Run, needs_precision

from pipeline.weights.run import load_run

STEPS = 8
TOLERANCE = {"bf16": 2e-2, "fp16": 1e-2}
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def full_precision(shards, tmp_path_factory):
    lines = Run(shards, tmp_path_factory.mktemp("fp32") / "run").train(1, train__steps=STEPS)
    return [line["loss"] for line in lines]


def compare(run, full_precision, precision, stage, ranks):
    needs_precision(precision)
    settings = {"engine__precision": precision, "engine__zero_stage": stage, "train__steps": STEPS}
    losses = [line["loss"] for line in run.train(ranks, **settings)]
    assert losses == approx(full_precision, rel=TOLERANCE[precision])
    weights = load_run(run.directory).method.state_dict()
    # The masters, not what 16 bits hold of them: a weight that 16 bits hold exactly has its low half zero.
    assert any((weight.view(torch.int32) & 0x1FFF).any() for weight in weights.values())


@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16", 1), pytest.param("fp16", 1, marks=pytest.mark.soak)]
)
def test_half_precision_follows_full_precision(run, full_precision, precision, stage):
    compare(run, full_precision, precision, stage, ranks=1)


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_follows_full_precision_on_every_stage(run, full_precision, precision, stage):
    compare(run, full_precision, precision, stage, ranks=2)
