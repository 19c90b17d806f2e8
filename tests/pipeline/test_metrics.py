"""Metrics are logged to metrics.jsonl and, by the real libraries, to W&B (offline) and to torch's profiler."""

import gzip
import json
import os
import struct
import subprocess
import sys

import psutil
import pytest
import torch
import wandb
from forkserver import run as fork
from wandb.proto.wandb_internal_pb2 import Record

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.train.metrics import MetricsLogger
from pipeline.train.profiler import Profiler
from pipeline.train.run_directory import RunDirectory
from pipeline.train.wandb_logger import WandbLogger

LINE = {
    "step": 1, "time": 0.0, "loss": 2.0, "images_per_s": 5.0, "data_wait": 0.1, "rank_time": 1.0,
    "slowest_time": 3.0, "slowest_rank": 7, "slowest_host": "node-9",
}  # fmt: skip
WANDB_FAILED = "W&B failed ("


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def recipe():
    return load_recipe("demo_emae", ["train.wandb=tests"])


@pytest.fixture(autouse=True)
def wandb_that_reads_the_environment_again():
    yield
    wandb.teardown()


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def read_lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def read_records(folder):
    """Read what wandb's service process wrote: a log in LevelDB's format, one block of 32 KiB after 7 bytes."""
    wandb.teardown()
    (path,) = folder.glob("*.wandb")
    data, offset = path.read_bytes(), 7
    assert len(data) < 2**15
    while offset < len(data):
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        assert kind == 1  # a whole record
        yield Record.FromString(data[offset + 7 : offset + 7 + length])
        offset += 7 + length


def test_resumed_run_resumes_its_wandb_run(recipe, run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        logger = MetricsLogger(run, recipe, step - 1, 4, [])
        logger.write({**LINE, "step": step})
        logger.close()
    records = [record for folder in run.wandb.glob("offline-run-*") for record in read_records(folder)]
    run_ids = {record.run.run_id for record in records if record.HasField("run")}
    assert run_ids == {(run.wandb / "id").read_text()}
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert sorted((line["step"], line["loss"]) for line in lines) == [(1, 2.0), (2, 2.0)]


@pytest.mark.parametrize("killed_before", ["a line", "the end"])
def test_run_survives_the_death_of_wandbs_service(recipe, run, monkeypatch, capsys, killed_before):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = MetricsLogger(run, recipe, 0, 4, [])
    services = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    for service in services:
        service.terminate()
    assert services and not psutil.wait_procs(services, timeout=10)[1]
    if killed_before == "a line":
        logger.write(LINE)
        logger.write({**LINE, "step": 2})
    logger.close()
    assert capsys.readouterr().err.count(WANDB_FAILED) == 1
    assert len(read_lines(run)) == (killed_before == "a line") * 2
    logger = MetricsLogger(run, recipe, 2, 4, [])
    logger.write({**LINE, "step": 3})
    logger.close()
    assert WANDB_FAILED not in capsys.readouterr().err
    newest = max(run.wandb.glob("offline-run-*"))
    assert any(record.HasField("history") for record in read_records(newest))


def test_run_survives_a_wandb_that_cannot_start(recipe, run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # a service that cannot be reached
    logger = MetricsLogger(run, recipe, 0, 4, [])
    logger.write(LINE)
    logger.close()
    assert capsys.readouterr().err.count(WANDB_FAILED) == 1
    assert read_lines(run) == [LINE]


def test_unreachable_wandb_server_disables_wandb(recipe, run, logged_out, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb_logger = WandbLogger(run, recipe)
    wandb_logger.log({"step": 1, "loss": 2.0})
    wandb_logger.close()
    assert capsys.readouterr().err.count(WANDB_FAILED) == 1


def test_wandb_without_login_is_a_user_error(recipe, run, logged_out):
    with pytest.raises(UserError, match=r"train\.wandb: .*wandb login"):
        WandbLogger(run, recipe)


def run_without_wandb(command: str, cold: bool = False) -> subprocess.CompletedProcess:
    """Run a command of `pipeline` as if wandb were not installed.

    Args:
        cold: Use a new interpreter.
    """
    code = "import sys, runpy; sys.modules['wandb'] = None; runpy.run_module('pipeline', run_name='__main__')"
    if not cold:
        return fork(["-c", code, *command.split()], env=os.environ | {"DS_ACCELERATOR": "cpu"})
    return subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)


@pytest.mark.parametrize(("wandb_key", "error"), [("tests", "train.wandb: "), ("null", "nowhere")])
def test_missing_wandb_is_one_error_line_if_asked_for(tmp_path, wandb_key, error):
    command = f"pretrain demo_emae --data nowhere --run {tmp_path}/run --set train.wandb={wandb_key}"
    ended = run_without_wandb(command, cold=True)
    assert ended.returncode == 2 and ended.stderr.startswith(f"pipeline: error: {error}")
    assert len(ended.stderr.splitlines()) == 1


def test_missing_wandb_ends_a_probe_before_it_starts(labelled_sets, tmp_path):
    sets = f"--data {labelled_sets[0]} --val {labelled_sets[1]}"
    ended = run_without_wandb(f"linprobe --weights pixels:24 {sets} --run {tmp_path}/run --set train.wandb=mine")
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("pipeline: error: "))
    assert ended.returncode == 2 and "train.wandb: " in line
    assert not (tmp_path / "run").exists()


def test_flush_writes_all_lines_to_the_file(run):
    logger = MetricsLogger(run, load_recipe("demo_emae"), 0, 4, [])
    logger._file.write("line")
    logger.flush()
    assert run.metrics.read_text() == "line"
    logger.close()


def test_lines_after_the_checkpoint_are_removed(run):
    run.metrics.write_text("".join(json.dumps({**LINE, "step": step, "time": step}) + "\n" for step in (1, 2, 3)))
    logger = MetricsLogger(run, load_recipe("demo_emae"), 2, 4, [])
    assert logger.last_line == {"step": 3, "time": 3}
    logger.write({**LINE, "step": 3})
    logger.close()
    assert [(line["step"], line["time"]) for line in read_lines(run)] == [(1, 1), (2, 2), (3, 0.0)]


def test_file_has_exactly_the_rollbacks_of_the_guard(run):
    kept, lost, discarded = ({"step": 1, "event": "rollback", "time": time} for time in (1.0, 2.0, 3.0))
    stop = {"step": 1, "event": "stop", "time": 4.0, "reason": "the loss is not finite"}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (LINE, kept, discarded, stop)))
    MetricsLogger(run, load_recipe("demo_emae"), 1, 4, [kept, lost]).close()
    assert read_lines(run) == [LINE, kept, lost]


def test_stop_event_is_on_disk_at_once(run):
    logger = MetricsLogger(run, load_recipe("demo_emae"), 0, 4, [])
    logger.write_stop(3, "the loss is a spike")
    (event,) = read_lines(run)
    logger.close()
    assert (event["step"], event["event"], event["reason"]) == (3, "stop", "the loss is a spike")


def test_old_lines_are_upgraded(run):
    skipped = [{"step": 2, "reason": "the loss is a spike", "loss": 9.0, "grad_norm": None}]
    event = {"step": 2, "time": 1.5, "from_step": 4, "reason": "the loss is not finite", "in_a_row": 1}
    old_event = {**event, "event": "return", "trouble": [3, 4]}
    old_lines = [{**LINE, "step": 2, "skipped": 1, "skips": skipped, "replaced": 2.0}, old_event]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in old_lines))
    rollback = {**event, "event": "rollback", "bad_span": [3, 4]}
    MetricsLogger(run, load_recipe("demo_emae"), 2, 4, [rollback]).close()
    line = {**LINE, "step": 2, "skipped": 1, "skipped_steps": skipped, "undecodable": 2.0}
    assert read_lines(run) == [line, rollback]


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"\xff\xfe", b'{"loss": 2.0}', b"[2]", b""])
def test_damaged_lines_are_removed_and_others_kept(run, capsys, damage):
    lines = [json.dumps({**LINE, "step": step}).encode() for step in (1, 2, 3, 4)]
    run.metrics.write_bytes(b"\n".join([lines[0], damage, *lines[2:], lines[0][:9]]))
    MetricsLogger(run, load_recipe("demo_emae"), 3, 4, []).close()
    assert [line["step"] for line in read_lines(run)] == [1, 3]
    assert f"{run.metrics}: removed 1 unreadable lines" in capsys.readouterr().err


def test_straggler_is_named(run, capsys):
    logger = MetricsLogger(run, load_recipe("demo_emae"), 0, 4, [])
    logger.write(LINE)
    logger.close()
    assert "slowest is rank 7 on node-9 (3.0 x the median)" in capsys.readouterr().err


def test_profiler_traces_only_the_chosen_steps(run):
    profiler = Profiler(run, 3, 4, torch.device("cpu"))
    paths = []
    for step in range(1, 7):
        profiler.start_step(step)
        torch.full((step,), 1.0).cumsum(0)
        paths.append(profiler.end_step(step))
    assert [path and path.name for path in paths] == [
        None, None, None, "steps-00000003-00000004.json.gz", None, None,
    ]  # fmt: skip
    with gzip.open(paths[3]) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 2


@pytest.mark.parametrize("steps", ["[0,2]", "[5,3]"])
def test_invalid_profile_steps_are_a_user_error(steps):
    with pytest.raises(UserError, match=r"train\.profile_steps: "):
        load_recipe("demo_emae", [f"train.profile_steps={steps}"])
