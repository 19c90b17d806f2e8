"""Verdicts and recommendations of gpu-check follow from what was measured and from the bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.gpu_check import compile as compile_check
from pipeline.gpu_check import loader_speed, memory, methods, network, resume, speed, stages
from pipeline.gpu_check.recommend import best_micro_batch, best_threads, recommend

CPU = torch.device("cpu")


@given(st.floats(0.5, 2.0))
def test_memory_may_exceed_the_estimate_by_a_tenth(ratio):
    rows = [{"micro_batch": 1, "measured_gib": ratio * gib, "estimated_gib": gib} for gib in (10.0, 20.0)]
    assert (memory.judge_memory(rows, "").verdict == "passed") == (ratio <= 1.1)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 0.50004], "passed"),
        ([1.0, 0.5001], "failed"),
        ([1.0, float("nan")], "failed"),
        ([float("nan")] * 2, "failed"),
    ],
)
def test_stages_must_have_the_losses_of_pytorch(values, verdict):
    losses = {
        "PyTorch, 1 rank": [1.0, 0.5],
        "fp32, ZeRO 1": [1.0, 0.5],
        "fp32, ZeRO 2": values,
        "bf16, ZeRO 1": [1.01, 0.505],
    }
    assert stages.judge_losses(losses, "PyTorch, 1 rank").verdict == verdict


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantity", ["loss", "norm", "masks"])
def test_methods_must_agree_with_the_reference(precision, quantity):
    right = {"fp32": methods.Errors(1e-6, 1e-6), "bf16": methods.Errors(1e-3, 1e-2)}
    assert methods.judge_errors(right, True, CPU).verdict == "passed"
    wrong = right if quantity == "masks" else {**right, precision: right[precision]._replace(**{quantity: 0.1})}
    assert methods.judge_errors(wrong, quantity != "masks", CPU).verdict == "failed"


def test_resumed_losses_must_be_equal_and_complete():
    losses = [(step, 1.0 / step) for step in range(1, 5)]
    close = [(step, loss * (1 + 1e-6)) for step, loss in losses]
    assert resume.judge_losses(losses, losses, close).verdict == "passed"
    assert resume.judge_losses(losses, losses, None).verdict == "passed"
    assert resume.judge_losses(losses, close, losses).verdict == "failed"
    assert resume.judge_losses(losses, losses[:-1], losses).verdict == "failed"
    assert resume.judge_losses(losses, losses, losses[1:]).verdict == "failed"


@pytest.mark.parametrize(
    ("breaks", "graphs", "difference", "verdict"),
    [(0, 2, 1e-3, "passed"), (1, 2, 0.0, "failed"), (0, 0, 0.0, "failed"), (0, 2, 0.1, "failed")],
)
def test_compiled_step_has_graphs_no_break_and_the_loss(breaks, graphs, difference, verdict):
    assert compile_check.judge_compile(breaks, graphs, difference, 1.0, 1.0).verdict == verdict


# ---- Speed


def speed_rows(mfu):
    row = {"recipe": "vitl16_mae", "ranks": 1, "mfu": None}
    rows = [
        {**row, "micro_batch": batch, "images_per_s": rate} for batch, rate in ((64, 80.0), (128, 99.0), (256, 100.0))
    ]
    rows[-1]["mfu"] = mfu
    return [
        *rows,
        *({**row, "micro_batch": 64, "zero_stage": stage, "images_per_s": 100.0 - stage} for stage in (1, 3)),
    ]


@pytest.mark.parametrize(("mfu", "verdict"), [(None, "measured"), (0.5, "below goal"), (0.6, "passed")])
def test_mfu_below_the_goal_is_not_a_failure(mfu, verdict):
    assert speed.judge_speed(speed_rows(mfu)).verdict == verdict


@pytest.mark.parametrize(
    ("demand", "on_gpu", "verdict"),
    [(80.0, True, "passed"), (90.0, True, "failed"), (0, True, "measured"), (90.0, False, "measured")],
)
def test_loader_must_be_faster_than_the_engine(demand, on_gpu, verdict):
    rows = [{"threads": n, "images_per_s": 50.0 * n, "cpu_ms": 1.0, "gpu_share": None} for n in (1, 2)]
    assert loader_speed.judge_rates(rows, demand, on_gpu).verdict == verdict


def test_wrong_sum_and_remote_cores_are_reported():
    rank = {
        "rank": 0,
        "backend": "nccl",
        "cores": 4,
        "torch_threads": 8,
        "correct": True,
        "gb_per_s": 1.0,
        "gloo_us": 9.0,
    }
    rank |= {"cpu_nodes": [0], "gpu_node": 1}
    finding = network.judge_ranks([rank, {**rank, "rank": 1, "gpu_node": 0}])
    assert finding.verdict == "passed" and "[0]" in finding.value and "OMP_NUM_THREADS" in finding.value
    assert network.judge_ranks([rank, {**rank, "correct": False}]).verdict == "failed"
    assert network.judge_ranks([rank]).verdict == "measured"


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=6))
def test_recommended_micro_batch_is_the_smallest_near_the_best(rates):
    rows = [{"micro_batch": 2**number, "images_per_s": rate} for number, rate in enumerate(rates)]
    best = best_micro_batch(rows)
    by_batch = {row["micro_batch"]: row["images_per_s"] for row in rows}
    assert by_batch[best] >= 0.97 * max(rates)
    assert all(rate < 0.97 * max(rates) for batch, rate in by_batch.items() if batch < best)


def test_recommendations_follow_from_measured_rows():
    findings = {
        "engine-speed": {"verdict": "measured", "rows": speed_rows(0.5)},
        "compile": {"verdict": "passed", "rows": [{"speed_up": 1.3, "first_step_s": 60.0}]},
        "loader-speed": {
            "verdict": "passed",
            "rows": [{"threads": n, "images_per_s": rate} for n, rate in ((1, 70.0), (2, 130.0), (4, 200.0))],
        },
    }
    assert recommend(findings) == {
        "engine.micro_batch": {"vitl16_mae": 128},
        "engine.zero_stage": 1,
        "engine.compile": True,
        "data.decode_threads": 2,
    }
    assert recommend({}) == {}
    failed = {name: {**finding, "verdict": "failed"} for name, finding in findings.items()}
    assert recommend(failed) == {}
    assert best_threads(findings["loader-speed"]["rows"], 1000.0) == 4
