"""`python -m pipeline bench-loader`: consistent figures, one-line errors."""

import json
import os

import pytest
import torch
from forkserver import run

from pipeline.data.decode_options import DecodeOptions
from pipeline.estimate.bench_loader import decode_variants
from pipeline.recipe.sections import DataSection


def bench(*arguments):
    return run(["-m", "pipeline", "bench-loader", *arguments], env={**os.environ, "DS_ACCELERATOR": "cpu"})


SMALL = ("--recipe", "demo_emae", "--set", "data.global_batch=16", "--set", "engine.micro_batch=16")


def test_the_figures_are_consistent(shards):
    done = bench(shards, *SMALL, "--threads", 2, 1, "--seconds", 1, "--gpu", "a100", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    lines = {(line["stage"], line["threads"]): line for line in result["measured"]}
    stages = ("decode", "decode and augment", "whole loader")
    assert {(stage, threads) for stage in stages for threads in (1, 2)} < lines.keys()
    assert {"read", "plan", "copy"} < {stage for stage, _ in lines}
    assert all(line["images_per_s"] > 0 and line["cpu_ms"] >= 0 for line in lines.values())

    demand, whole = result["demand"], lines["whole loader", 2]
    assert demand["delivered"] == whole["images_per_s"] and demand["gpu"] == "a100"
    assert demand["data_wait"] == pytest.approx(max(0, 1 - demand["delivered"] / demand["images_per_s"]))
    assert demand["cores"] == pytest.approx(demand["images_per_s"] * whole["cpu_ms"] / 1000)


def test_a_gpu_is_measured_by_share_of_the_hardware_decoder():
    gpu, data = torch.device("cuda", 0), DataSection(hw_decoder_load=0.5)
    loads = {options.hw_decoder_load for options in decode_variants(data, gpu).values()}
    assert loads == {0, 0.5, 1} and not any(options.roi for options in decode_variants(data, gpu).values())
    regions = decode_variants(data.model_copy(update={"roi_decode": True}), gpu)
    assert [options for options in regions.values() if options.roi] == [DecodeOptions("mixed", True, 0.5)]
    assert decode_variants(data, torch.device("cpu")) == {"decode": DecodeOptions()}


def test_the_table_ends_with_the_data_wait(shards):
    done = bench(shards, *SMALL, "--threads", 1, "--seconds", 1)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "images/s" in lines[1] and "data wait" in lines[-1]
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere",), "nowhere"),
        ((None, "--gpu", "abacus"), "--gpu abacus: unknown"),
        ((None, "--mfu", "1.5"), "--mfu 1.5"),
        ((None, "--set", "data.prefetch=0"), "data.prefetch"),
    ],
)
def test_a_user_error_is_one_line(shards, arguments, expected):
    done = bench(*(argument or shards for argument in arguments))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and expected in done.stderr
