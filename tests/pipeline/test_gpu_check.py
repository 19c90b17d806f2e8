"""gpu-check: a fault makes the check about it fail, a crash fails one check only, and verdicts follow the bounds."""

import json
import os
from dataclasses import replace

import forkserver
import psutil
import pytest
import torch
from gpu_check_faults import crash_after_the_result, double, fail, hang
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.dali import training_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.errors import UserError
from pipeline.gpu_check import compile as compile_check
from pipeline.gpu_check import loader_speed, memory, methods, network, resume, speed, stages
from pipeline.gpu_check.check import Context
from pipeline.gpu_check.child import ChildError, call
from pipeline.gpu_check.command import gpu_check
from pipeline.gpu_check.device_errors import decode_with, fail_on_every_image, judge_damaged, judge_failure
from pipeline.gpu_check.pixels import (
    cpu_source,
    digest,
    judge_pixels,
    late_digests,
    pixel_source,
    small_batches,
    training_batches,
)
from pipeline.gpu_check.recommend import best_micro_batch, best_threads, recommend
from pipeline.gpu_check.registry import CHECKS, Check
from pipeline.gpu_check.sample_images import KINDS, build_shard_set, make_jpeg

CPU = torch.device("cpu")
HERE = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    samples = str(build_shard_set(folder / "samples", 64, 96))
    return Context("cpu", 1, samples, samples, str(folder))


@pytest.fixture(scope="module")
def recipe(context):
    return small_batches(context)


@pytest.fixture(scope="module")
def batches(context, recipe):
    return training_batches(recipe, context.photographs)


@pytest.fixture(scope="module")
def graph(recipe):
    """The GPU's graph with CPU operators."""
    return training_pipeline_def(recipe.data, DecodeOptions(roi=False), all_in_dali=True)


# ---- Child processes


@pytest.fixture
def child(monkeypatch):
    """A function that calls one of gpu_check_faults.py in a child process."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{forkserver.ROOT}")

    def call_fault(function, timeout_s=60.0, **arguments):
        name = function if isinstance(function, str) else function.__name__
        return call(f"gpu_check_faults:{name}", arguments, device="cpu", timeout_s=timeout_s)

    return call_fault


def test_child_returns_the_result(child):
    assert child(double, number=21) == 42


def test_exception_in_a_child_is_its_first_line(child):
    with pytest.raises(ChildError, match=r"^ValueError: the first line$") as raised:
        child(fail)
    assert "Traceback" in raised.value.output


def test_segmentation_fault_is_an_error_with_stacks(child):
    with pytest.raises(ChildError, match="SIGSEGV") as raised:
        child("crash")
    assert "in crash" in raised.value.output


def test_crash_after_the_result_is_an_error(child):
    with pytest.raises(ChildError, match="SIGKILL"):
        child(crash_after_the_result, result=1)


def test_hanging_child_is_killed_with_its_descendants(child, tmp_path):
    path = tmp_path / "pid"
    with pytest.raises(ChildError, match="no result after 3 s"):
        child(hang, timeout_s=3.0, path=str(path))
    pid = int(path.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# ---- The command


def test_crashed_check_fails_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{forkserver.ROOT}")
    path = tmp_path / "report.json"
    names = ("crashing_check", "passing_check")
    checks = [Check(name, f"gpu_check_faults:{name}") for name in names]
    assert not gpu_check("cpu", json_file=path, checks=checks)
    report = json.loads(path.read_text())
    assert [(check["name"], check["verdict"]) for check in report["checks"]] == [
        (names[0], "failed"),
        (names[1], "passed"),
    ]
    assert all(check.keys() == {"name", "value", "bound", "verdict"} for check in report["checks"])
    assert "SIGSEGV" in report["checks"][0]["value"]
    captured = capsys.readouterr()
    assert all(name in captured.out for name in names) and "in crashing_check" in captured.err


def test_command_reports_decoding_checks(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--only", "pixels", "device-errors", "loader-speed", "--json", path]
    done = forkserver.run(["-m", "pipeline", "gpu-check", *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts == {"pixels": "passed", "device-errors": "passed", "loader-speed": "measured"}
    assert all("no GPU" in check["value"] or "CPU" in check["value"] for check in report["checks"])
    threads = [row["threads"] for row in report["measured"]["loader-speed"]]
    assert report["recommended"] == {"data.decode_threads": report["recommended"]["data.decode_threads"]}
    assert report["recommended"]["data.decode_threads"] in threads
    assert "--set data.decode_threads=" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_is_a_user_error():
    done = forkserver.run(["-m", "pipeline", "gpu-check", "--only", "pixels"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--device cpu" in done.stderr and not done.stdout


def test_launched_or_misplaced_report_is_refused_at_once(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--json"):
        gpu_check("cpu", json_file=tmp_path / "nowhere" / "report.json")
    with pytest.raises(UserError, match="nowhere"):
        gpu_check("cpu", data=str(tmp_path / "nowhere"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="launcher"):
        gpu_check("cpu")


def test_there_are_fifteen_checks_and_each_can_be_imported():
    from pipeline.gpu_check.check import resolve

    assert len({check.name for check in CHECKS}) == 15
    assert all(callable(resolve(check.function)) for check in CHECKS)


# ---- Pixels


def test_sample_images_have_every_kind_and_odd_sizes():
    import io

    from PIL import Image

    images = [Image.open(io.BytesIO(make_jpeg(number, 96))) for number in range(2 * len(KINDS))]
    assert {image.mode for image in images} == {"RGB", "L"}
    assert sum("progressive" in image.info for image in images) == 4
    subsampled = {image.layer[0][1:3] for image in images if image.mode == "RGB"}  # sampling factors of luma
    assert subsampled == {(1, 1), (2, 2)}
    assert {image.width % 2 for image in images} == {0, 1}


def test_gpu_graph_on_the_cpu_has_the_pixels_of_the_cpu_path(batches, recipe, graph):
    finding = judge_pixels(pixel_source(graph, CPU), cpu_source(recipe.data), batches, recipe.data, repeat=True)
    assert finding.verdict == "passed", finding


@pytest.mark.parametrize(("levels", "rows"), [(0.6, slice(None)), (2.1, slice(5, 6))], ids=["all images", "one image"])
def test_wrong_pixels_fail(batches, recipe, levels, rows):
    reference = cpu_source(recipe.data)

    def wrong(specs):
        for images in reference(specs):
            images[rows] += levels / (255 * torch.tensor(recipe.data.std)[:, None, None])
            yield images

    assert judge_pixels(wrong, reference, batches, recipe.data).verdict == "failed"


def test_other_pixels_the_second_time_fail(batches, recipe):
    reference, calls = cpu_source(recipe.data), []

    def unsteady(specs):
        calls.append(None)
        for images in reference(specs):
            yield images + 1e-3 * len(calls)

    assert judge_pixels(unsteady, reference, batches, recipe.data).verdict == "passed"
    assert judge_pixels(unsteady, reference, batches, recipe.data, repeat=True).verdict == "failed"


def test_decoder_that_fails_on_every_image_is_not_compared(batches, recipe, graph):
    with pytest.raises(Exception, match="good image"):
        judge_pixels(pixel_source(fail_on_every_image(graph), CPU), cpu_source(recipe.data), batches, recipe.data)


def test_failing_device_is_told_from_a_damaged_image(context, batches, recipe, graph, tmp_path):
    size = len(batches[0].encoded)
    right, broken = decode_with(graph, CPU, size), decode_with(fail_on_every_image(graph), CPU, size)
    assert judge_damaged(right, recipe, context.photographs, batches[0], tmp_path / "1").verdict == "passed"
    assert judge_failure(broken, recipe, context.photographs, batches[:1], tmp_path / "2").verdict == "passed"
    assert judge_failure(right, recipe, context.photographs, batches[:1], tmp_path / "3").verdict == "failed"

    def blames_the_images(specs, builder):
        builder.undecodable.add(0, 0, "the device")
        raise UserError("data.max_undecodable")

    assert judge_failure(blames_the_images, recipe, context.photographs, [], tmp_path / "4").verdict == "failed"


@given(st.integers(0, 5), st.integers(1, 8))
def test_late_digests_are_those_of_the_batches_in_order(lag, count):
    batches = [torch.full((1, 3, 2, 2), float(number)) for number in range(count)]
    assert late_digests(iter(batches), lag, lambda: None) == [digest(images).item() for images in batches]


def test_memory_that_is_reused_too_early_changes_late_digests():
    memory = torch.zeros(1, 3, 2, 2)

    def batches():
        for number in range(8):
            yield memory.fill_(number)

    assert late_digests(batches(), 0, lambda: None) != late_digests(batches(), 3, lambda: None)


@given(st.integers(0, 11), st.integers(0, 31))
def test_digest_depends_on_every_bit_and_the_order(position, bit):
    images = torch.arange(12, dtype=torch.float32).view(1, 3, 2, 2)
    other = images.clone()
    other.view(torch.int32).view(-1)[position] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert digest(other) != digest(images)
    assert digest(images.flip(1)) != digest(images)


# ---- Training


def fork(function, **arguments):
    """Call "module:function" in a process that has imported the heavy modules. Returns the result, a JSON value."""
    module, _, name = function.partition(":")
    code = (
        f"import json; from {module} import {name}; print(json.dumps({name}(**json.loads({json.dumps(arguments)!r}))))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": HERE}
    done = forkserver.run(["-c", code], env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_step_that_should_have_been_skipped_fails(context):
    arguments = {"context": context.__dict__, "precision": "fp32", "stages": [(1, "none")]}
    right = fork("pipeline.gpu_check.stage_ranks:skip_on_stages", **arguments)
    assert stages.judge_skips(right).verdict == "passed"
    never = fork("gpu_check_faults:never_skip", context=context.__dict__)
    assert stages.judge_skips(never).verdict == "failed"


def test_memory_above_the_estimate_fails(context):
    assert fork("gpu_check_faults:memory_verdict", context=context.__dict__) == "passed"
    assert fork("gpu_check_faults:memory_verdict", context=context.__dict__, gib=100.0) == "failed"


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


def test_methods_in_float32_are_close_to_float64(context):
    recipe = context.recipe("vitb16_mae", "model.depth=1")
    reference = methods.train(recipe, CPU, torch.float64)
    assert methods.compare(reference, reference) == methods.Errors(0, 0)
    errors = methods.compare(methods.train(recipe, CPU, torch.float32), reference)
    assert 0 < max(errors) < max(methods.BOUNDS["fp32"])


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


def test_context_round_trips_through_json(context):
    changed = replace(context, rows={"network": [{"rank": 0}]})
    assert Context(**json.loads(json.dumps(changed.__dict__))) == changed
