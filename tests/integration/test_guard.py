"""The guard skips bad steps, rolls back, and finally stops the run, on all ranks alike and never silently."""

import pytest
from runs import FaultyRun, Run, launch_processes, run_module, skip_unless_supported

from data_prep.shard_set import read_manifest
from pipeline.report.page import report

DATA_FAULT = {"kind": "loss", "data_of_steps": [10, 11]}
WITH_ROLLBACK = {"train__steps": 14, "guard__max_consecutive_skips": 2, "train__log_every": 2}


def steps_and_losses(lines):
    return [(line["step"], line["loss"]) for line in lines if "event" not in line]


def events(lines):
    """Return the events without their times."""
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if "event" in line]


@pytest.mark.parametrize("precision", ["bf16", *(pytest.param(p, marks=pytest.mark.soak) for p in ("fp32", "fp16"))])
def test_skipped_step_changes_no_bit_of_the_state(precision):
    skip_unless_supported(precision)
    # Four stages, each with and without clipping, and two stages with offload.
    assert run_module("skipped_step", precision).count(" tensors; ") == 4 * 2 + 2


def test_bad_losses_gradients_and_spikes_are_skipped(shards, tmp_path):
    faults = [
        {"kind": "loss", "steps": [3]},
        {"kind": "gradient", "steps": [6]},
        {"kind": "spike", "steps": [4, 12]},  # at step 4 there are not enough losses to compare with
        {"kind": "slow", "rank": 1, "seconds": 0.3},
    ]
    run = FaultyRun(shards, tmp_path / "run", faults)
    lines = run.train(2, train__steps=13, guard__window=8, train__log_every=3, engine__zero_stage=2)
    assert [line["skipped"] for line in lines] == [1, 1, 0, 1, 0]
    skipped_steps = [skip for line in lines for skip in line.get("skipped_steps", [])]
    assert [(skip["step"], skip["reason"]) for skip in skipped_steps] == [
        (3, "the loss is not finite"),
        (6, "the gradient is not finite"),
        (12, "the loss is a spike"),
    ]
    assert all(line["loss"] < 100 for line in lines if line["step"] != 6)
    # A step has two micro batches. The first line includes what both ranks do only once.
    assert {line["slowest_rank"] for line in lines[1:]} == {1}
    assert all(line["slowest_time"] > 0.6 > line["data_wait"] for line in lines[1:])
    output = run.output.read_text()
    assert all(output.count(f" WARNING rank 0] step {step} skipped: ") == 1 for step in (3, 6, 12))
    assert run.directory.joinpath("checkpoints", "step-00000013").is_dir()
    page = report([run.directory]).read_text()
    assert all(f"<td>{skip['step']}</td><td>{skip['reason']}</td>" in page for skip in skipped_steps)


def test_step_skipped_before_an_early_stop_is_logged(shards, tmp_path):
    faults = [{"kind": "loss", "steps": [3]}, {"kind": "signal", "steps": [3]}]
    run = FaultyRun(shards, tmp_path / "run", faults)
    settings = {"train__log_every": 100, "train__checkpoint_every": 100, "engine__micro_batch": 16}
    assert run.start(1, train__steps=8, **settings).wait() == 75
    assert run.output.read_text().count("step 3 skipped: the loss is not finite") == 1


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    """A run with a rollback."""
    run = FaultyRun(shards, tmp_path_factory.mktemp("rollback") / "run", [DATA_FAULT])
    run.train(2, **WITH_ROLLBACK)
    return run


def test_rollback_continues_behind_the_bad_data(uninterrupted):
    lines = uninterrupted.metrics()
    size = read_manifest(uninterrupted.shards).num_samples
    (event,) = events(lines)
    assert event["event"] == "rollback" and event["bad_span"] == [10, 11] and event["step"] == 8
    assert event["skipped_samples"] == 3 * 16
    assert [step for step, _ in steps_and_losses(lines)] == [2, 4, 6, 8, 10, 12, 14]
    assert sum(line["skipped"] for line in lines if "event" not in line) == 0
    assert lines[-1]["epoch"] * size == pytest.approx(14 * 16 + 48)
    samples = (uninterrupted.directory / "offending-samples.txt").read_text().splitlines()
    assert len(samples) == len(set(samples)) == 2 * 16
    page = report([uninterrupted.directory]).read_text()
    assert "rolled back by the guard from step 11: steps 10 to 11 were skipped" in page


@pytest.mark.parametrize("moment", [pytest.param("after the rollback", marks=pytest.mark.soak), "step 13"])
def test_run_killed_after_a_rollback_ends_with_same_losses(uninterrupted, shards, tmp_path, moment):
    run = FaultyRun(shards, tmp_path / "run", [DATA_FAULT])
    if moment == "step 13":
        run.kill_at(2, moment, **WITH_ROLLBACK)
    else:
        run.kill_when(run.start(2, **WITH_ROLLBACK), lambda: events(run.metrics()))
    run.train(2, **WITH_ROLLBACK)
    lines, expected = run.metrics(), uninterrupted.metrics()
    assert steps_and_losses(lines) == steps_and_losses(expected) and events(lines) == events(expected)


def test_divergence_that_stays_ends_the_run_with_4(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "gradient", "steps": list(range(10, 30))}])
    settings = {"train__steps": 20, "guard__max_consecutive_skips": 3, "guard__max_rollbacks": 2}
    assert run.start(2, **settings).wait() == 4
    rollbacks = [line for line in run.metrics() if line.get("event") == "rollback"]
    assert [line["step"] for line in rollbacks] == [8, 4]
    assert [line["in_a_row"] for line in rollbacks] == [1, 2]
    assert run.metrics()[-1]["event"] == "stop"
    output = run.output.read_text()
    assert "optim.base_lr" in output and "engine.precision" in output and "offending-samples.txt" in output
    assert "Traceback" not in output
    assert run.start(2, **settings).wait() == 4  # the same command does not start from scratch


def test_divergence_before_the_first_checkpoint_ends_with_4(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "loss", "steps": [2, 3]}])
    run.launch = launch_processes  # exit code 4 must survive the finalization of the interpreter
    assert run.start(1, train__steps=8, guard__max_consecutive_skips=2).wait() == 4
    assert "no earlier checkpoint" in run.output.read_text()


@pytest.mark.soak
def test_all_ranks_stop_if_bad_samples_cannot_be_written(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "loss", "steps": [2, 3]}])
    process = run.start(2, train__steps=8, guard__max_consecutive_skips=2)
    run.wait_for(process, (run.directory / "recipe.yaml").exists)
    (run.directory / "offending-samples.txt").mkdir()
    assert process.wait(60) == 2
    output = run.output.read_text()
    assert output.count("pipeline: error: ") == 1 and "offending-samples.txt" in output
    assert "Traceback" not in output


def test_healthy_run_skips_no_step(shards, tmp_path):
    lines = Run(shards, tmp_path / "run").train(1, train__steps=40, guard__window=16)
    assert sum(line["skipped"] for line in lines) == 0
