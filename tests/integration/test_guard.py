"""What goes wrong is skipped, the run goes back, and in the end it stops; never silently, on any rank."""

import pytest
from runs import FaultyRun, Run, launch_processes, needs_precision, printed

from data_prep.shard_set import read_manifest
from pipeline.report.page import report

DATA_FAULT = {"kind": "loss", "data_of_steps": [10, 11]}
RETURNING = {"train__steps": 14, "guard__max_consecutive_skips": 2, "train__log_every": 2}


def trained(lines):
    return [(line["step"], line["loss"]) for line in lines if "event" not in line]


def events(lines):
    """All of them, but for when they happened."""
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if "event" in line]


@pytest.mark.parametrize(
    "precision", ["bf16", *(pytest.param(p, marks=pytest.mark.soak) for p in ("fp32", "fp16"))]
)
def test_a_skipped_step_moves_no_bit_of_weights_moments_and_counters(precision):
    needs_precision(precision)
    # Stages x with and without clipping, two stages with offload.
    assert printed("skipped_step", precision).count(" tensors; ") == 4 * 2 + 2


def test_bad_losses_gradients_and_spikes_are_skipped_counted_and_said(shards, tmp_path):
    faults = [
        {"kind": "loss", "steps": [3]},
        {"kind": "gradient", "steps": [6]},
        {"kind": "spike", "steps": [4, 12]},  # at 4 nobody knows yet what a loss should be
        {"kind": "slow", "rank": 1, "seconds": 0.3},
    ]
    run = FaultyRun(shards, tmp_path / "run", faults)
    lines = run.train(2, train__steps=13, guard__window=8, train__log_every=3, engine__zero_stage=2)
    assert [line["skipped"] for line in lines] == [1, 1, 0, 1, 0]
    said = [skip for line in lines for skip in line.get("skipped_steps", [])]
    assert [(skip["step"], skip["reason"]) for skip in said] == [
        (3, "the loss is not finite"),
        (6, "the gradient is not finite"),
        (12, "the loss is a spike"),
    ]
    assert all(line["loss"] < 100 for line in lines if line["step"] != 6)
    # In two micro batches. The first line has what both ranks do once.
    assert {line["slowest_rank"] for line in lines[1:]} == {1}
    assert all(line["slowest_time"] > 0.6 > line["data_wait"] for line in lines[1:])
    output = run.output.read_text()
    assert all(output.count(f"step {step} is skipped: ") == 1 for step in (3, 6, 12))
    assert run.directory.joinpath("checkpoints", "step-00000013").is_dir()
    page = report([run.directory]).read_text()
    assert all(f"<td>{skip['step']}</td><td>{skip['reason']}</td>" in page for skip in said)


def test_a_step_that_is_skipped_just_before_an_early_stop_is_said(shards, tmp_path):
    faults = [{"kind": "loss", "steps": [3]}, {"kind": "signal", "steps": [3]}]
    run = FaultyRun(shards, tmp_path / "run", faults)
    settings = {"train__log_every": 100, "train__checkpoint_every": 100, "engine__micro_batch": 16}
    assert run.start(1, train__steps=8, **settings).wait() == 75
    assert run.output.read_text().count("step 3 is skipped: the loss is not finite") == 1


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    run = FaultyRun(shards, tmp_path_factory.mktemp("returning") / "run", [DATA_FAULT])
    run.train(2, **RETURNING)
    return run


def test_a_run_goes_back_and_on_behind_the_data_that_broke_it(undisturbed):
    size = read_manifest(undisturbed.shards).num_samples
    (event,) = events(undisturbed.metrics())
    assert event["event"] == "rollback" and event["bad_span"] == [10, 11] and event["step"] == 8
    assert event["skipped_samples"] == 3 * 16
    assert [step for step, _ in trained(undisturbed.metrics())] == [2, 4, 6, 8, 10, 12, 14]
    assert sum(line["skipped"] for line in undisturbed.metrics() if "event" not in line) == 0
    assert undisturbed.metrics()[-1]["epoch"] * size == pytest.approx(14 * 16 + 48)
    bad = (undisturbed.directory / "offending-samples.txt").read_text().splitlines()
    assert len(bad) == len(set(bad)) == 2 * 16
    page = report([undisturbed.directory]).read_text()
    assert "the guard went back from step 11: steps 10 to 11 were skipped in a row" in page


@pytest.mark.parametrize("moment", [pytest.param("returned", marks=pytest.mark.soak), "trained on"])
def test_killed_after_a_return_it_ends_as_if_it_had_not_been(undisturbed, shards, tmp_path, moment):
    run = FaultyRun(shards, tmp_path / "run", [DATA_FAULT])
    if moment == "trained on":
        run.kill_at(2, "step 13", **RETURNING)
    else:
        run.kill_when(run.start(2, **RETURNING), lambda: events(run.metrics()))
    run.train(2, **RETURNING)
    lines, expected = run.metrics(), undisturbed.metrics()
    assert trained(lines) == trained(expected) and events(lines) == events(expected)


def test_trouble_that_stays_ends_the_run_with_exit_code_4_and_advice(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "gradient", "steps": list(range(10, 30))}])
    settings = {"train__steps": 20, "guard__max_consecutive_skips": 3, "guard__max_rollbacks": 2}
    assert run.start(2, **settings).wait() == 4
    rollbacks = [line for line in run.metrics() if line.get("event") == "rollback"]
    assert [line["step"] for line in rollbacks] == [8, 4] and [line["in_a_row"] for line in rollbacks] == [
        1,
        2,
    ]
    assert run.metrics()[-1]["event"] == "stop"
    output = run.output.read_text()
    assert "optim.base_lr" in output and "engine.precision" in output and "offending-samples.txt" in output
    assert "Traceback" not in output
    assert run.start(2, **settings).wait() == 4  # it does not begin anew by itself


def test_without_a_checkpoint_to_go_back_to_it_stops(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "loss", "steps": [2, 3]}])
    run.launch = launch_processes  # exit code 4 outlives the end of the interpreter and of its connections
    assert run.start(2, train__steps=8, guard__max_consecutive_skips=2).wait() == 4
    assert "there is no checkpoint from before that" in run.output.read_text()


@pytest.mark.soak
def test_all_ranks_stop_where_one_cannot_write_what_went_wrong(shards, tmp_path):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "loss", "steps": [2, 3]}])
    process = run.start(2, train__steps=8, guard__max_consecutive_skips=2)
    run.wait_for(process, (run.directory / "recipe.yaml").exists)
    (run.directory / "offending-samples.txt").mkdir()
    assert process.wait(60) == 2
    output = run.output.read_text()
    assert output.count("pipeline: error: ") == 1 and "offending-samples.txt" in output
    assert "Traceback" not in output


def test_a_healthy_run_never_trips(shards, tmp_path):
    lines = Run(shards, tmp_path / "run").train(1, train__steps=60, guard__window=16)
    assert sum(line["skipped"] for line in lines) == 0
