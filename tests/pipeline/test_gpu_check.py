"""gpu-check: a fault makes the check about it fail, and a crash fails one check only."""

import json
import os
import sys
import time
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
from pipeline.gpu_check import methods, stages
from pipeline.gpu_check.check import Context
from pipeline.gpu_check.child import ChildError, call, run
from pipeline.gpu_check.command import gpu_check
from pipeline.gpu_check.decode_errors import decode_with, fail_on_every_image, judge_damaged, judge_failure
from pipeline.gpu_check.pixels import (
    cpu_source,
    digest,
    judge_pixels,
    late_digests,
    pixel_source,
    small_batches,
    training_batches,
)
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
    path, output = tmp_path / "pid", tmp_path / "output"
    command = [
        sys.executable,
        "-m",
        "pipeline.gpu_check.child",
        "gpu_check_faults:hang",
        json.dumps({"path": str(path)}),
    ]
    assert not run([*command, str(tmp_path / "result")], output, device="cpu", timeout_s=60.0, stop_when=path.exists)
    pid = int(path.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ChildError, match="no result after 0 s"):
        child(hang, timeout_s=0.0, path=str(path))


# ---- The command


def test_crashed_check_fails_and_the_others_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{forkserver.ROOT}")
    path = tmp_path / "report.json"
    functions = {"pixels": "crashing_check", "loader-speed": "passing_check"}
    checks = [Check(name, f"gpu_check_faults:{function}") for name, function in functions.items()]
    assert not gpu_check("cpu", json_file=path, checks=checks)
    report = json.loads(path.read_text())
    verdicts = [(check["name"], check["verdict"]) for check in report["checks"]]
    assert verdicts == [("pixels", "failed"), ("loader-speed", "passed")]
    assert all(check.keys() == {"name", "value", "bound", "verdict"} for check in report["checks"])
    assert "SIGSEGV" in report["checks"][0]["value"]
    assert report["recommended"] == {"data.decode_threads": 1}
    captured = capsys.readouterr()
    assert all(name in captured.out for name in functions) and "in crashing_check" in captured.err
    assert "--set data.decode_threads=1" in captured.out.splitlines()[-1]


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


def fork(function, /, **arguments):
    """Call "module:function" in a process that has imported the heavy modules. Returns the result, a JSON value."""
    module, _, name = function.partition(":")
    code = (
        f"import json; from {module} import {name}; print(json.dumps({name}(**json.loads({json.dumps(arguments)!r}))))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": HERE}
    done = forkserver.run(["-c", code], env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "verdict"), [("pixels", "passed"), ("decode-errors", "passed"), ("loader-speed", "measured")]
)
def test_decoding_checks_run_on_the_cpu(context, name, verdict):
    (check,) = [check for check in CHECKS if check.name == name]
    finding = fork("pipeline.gpu_check.check:run_check_as_json", function=check.function, context=context.__dict__)
    assert finding["verdict"] == verdict
    assert "no GPU" in finding["value"] or "CPU" in finding["value"]


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


def test_step_that_should_have_been_skipped_fails(context):
    arguments = {"context": context.__dict__, "precision": "fp32", "stages": [(1, "none")]}
    right = fork("pipeline.gpu_check.stage_ranks:skip_on_stages", **arguments)
    assert stages.judge_skips(right).verdict == "passed"
    never = fork("gpu_check_faults:never_skip", context=context.__dict__)
    assert stages.judge_skips(never).verdict == "failed"


def test_memory_above_the_estimate_fails(context):
    assert fork("gpu_check_faults:memory_verdict", context=context.__dict__, gib=100.0) == "failed"


def test_methods_in_float32_are_close_to_float64(context):
    recipe = context.recipe("vitb16_mae", "model.depth=1")
    reference = methods.train(recipe, CPU, torch.float64)
    assert methods.compare(reference, reference) == methods.Errors(0, 0)
    errors = methods.compare(methods.train(recipe, CPU, torch.float32), reference)
    assert 0 < max(errors) < max(methods.BOUNDS["fp32"])


def test_context_round_trips_through_json(context):
    changed = replace(context, rows={"network": [{"rank": 0}]})
    assert Context(**json.loads(json.dumps(changed.__dict__))) == changed
