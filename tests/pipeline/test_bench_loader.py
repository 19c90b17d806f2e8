"""`python -m pipeline bench-loader`: its figures fit together, its complaints are one line."""

import json
import os

import pytest
from forkserver import run


def bench(*arguments):
    return run(["-m", "pipeline", "bench-loader", *arguments], env={**os.environ, "DS_ACCELERATOR": "cpu"})


SMALL = ("--recipe", "demo_emae", "--set", "data.global_batch=16", "--set", "engine.micro_batch=16")


def test_the_figures_fit_together(shards):
    finished = bench(shards, *SMALL, "--threads", 2, 1, "--seconds", 1, "--gpu", "a100", "--json")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    stages = [(line["stage"], line["threads"]) for line in found["measured"]]
    for threads in (1, 2):
        for stage in ("decode", "decode and augment", "whole loader"):
            assert (stage, threads) in stages
    assert {"read", "plan", "copy"} < {stage for stage, _ in stages}
    rates = {(line["stage"], line["threads"]): line["images_per_s"] for line in found["measured"]}
    assert min(rates.values()) > 0 and all(line["cpu_ms"] >= 0 for line in found["measured"])

    demand = found["demand"]
    assert demand["delivered"] == rates["whole loader", 2] and demand["gpu"] == "a100"
    assert demand["data_wait"] == pytest.approx(max(0, 1 - demand["delivered"] / demand["images_per_s"]))
    whole = next(
        line for line in found["measured"] if line["stage"] == "whole loader" and line["threads"] == 2
    )
    assert demand["cores"] == pytest.approx(demand["images_per_s"] * whole["cpu_ms"] / 1000)


def test_it_prints_a_table_and_what_a_model_would_wait(shards):
    finished = bench(shards, *SMALL, "--threads", 1, "--seconds", 1)
    lines = finished.stdout.splitlines()
    assert finished.returncode == 0 and "images/s" in lines[1] and "data wait" in lines[-1]
    assert "Warning" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere"),
        ((None, "--gpu", "abacus"), "--gpu abacus: unknown"),
        ((None, "--mfu", "1.5"), "--mfu 1.5"),
        ((None, "--set", "data.prefetch=0"), "data.prefetch"),
    ],
)
def test_a_mistake_is_one_line(shards, arguments, words):
    finished = bench(*(argument or shards for argument in arguments))
    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1 and words in finished.stderr
