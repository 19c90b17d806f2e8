"""bf16 and fp16 have the losses of fp32, up to their precision, on every ZeRO stage."""

import pytest
import torch
from pytest import approx
from runs import Run, skip_unless_supported

from pipeline.weights.run import load_run

STEPS = 8
TOLERANCE = {"bf16": 2e-2, "fp16": 1e-2}
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def fp32_losses(shards, tmp_path_factory):
    lines = Run(shards, tmp_path_factory.mktemp("fp32") / "run").train(1, train__steps=STEPS)
    return [line["loss"] for line in lines]


def compare(run, fp32_losses, precision, stage, ranks):
    skip_unless_supported(precision)
    settings = {"engine__precision": precision, "engine__zero_stage": stage, "train__steps": STEPS}
    losses = [line["loss"] for line in run.train(ranks, **settings)]
    assert losses == approx(fp32_losses, rel=TOLERANCE[precision])
    weights = load_run(run.directory).method.state_dict()
    # Saved are the fp32 weights: of a weight that 16 bits represent exactly, the lower bits are zero.
    assert any((weight.view(torch.int32) & 0x1FFF).any() for weight in weights.values())


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), pytest.param("fp16", 1, marks=pytest.mark.soak)])
def test_half_precision_has_the_losses_of_fp32(run, fp32_losses, precision, stage):
    compare(run, fp32_losses, precision, stage, ranks=1)


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_has_the_losses_of_fp32_on_every_stage(run, fp32_losses, precision, stage):
    compare(run, fp32_losses, precision, stage, ranks=2)
