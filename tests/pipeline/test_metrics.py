"""Where a run's numbers go, in the real libraries: Weights & Biases offline, torch's profiler."""

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
from forkserver import run
from wandb.proto.wandb_internal_pb2 import Record

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.train import wandb_logger
from pipeline.train.metrics import MetricsLogger
from pipeline.train.profiler import Profiler

LINE = {
    "step": 1, "time": 0.0, "loss": 2.0, "images_per_s": 5.0, "data_wait": 0.1, "rank_time": 1.0,
    "slowest_time": 3.0, "slowest_rank": 7, "slowest_host": "node-9",
}  # fmt: skip


@pytest.fixture
def recipe():
    return load_recipe("demo_emae", ["train.wandb=tests", "train.profile_steps=[3,5]"])


@pytest.fixture(autouse=True)
def a_library_that_reads_the_environment_anew():
    yield
    wandb.teardown()


@pytest.fixture
def logged_in_nowhere(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def records(folder):
    """What wandb's helper process wrote until its end: a log in LevelDB's format, of one block of 32 KiB,
    behind a header of 7 bytes."""
    wandb.teardown()
    (path,) = folder.glob("*.wandb")
    data, at = path.read_bytes(), 7
    assert len(data) < 2**15
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1  # a whole record
        yield Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


def test_a_continued_run_is_the_same_wandb_run_and_goes_on_there(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        log = MetricsLogger(tmp_path, recipe, step - 1, 4, [])
        log.write({**LINE, "step": step})
        log.close()
    found = [list(records(folder)) for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert {r.run.run_id for part in found for r in part if r.HasField("run")} == {
        (tmp_path / "wandb" / "id").read_text()
    }
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for part in found
        for r in part
        if r.HasField("history")
    ]
    assert sorted((line["step"], line["loss"]) for line in lines) == [(1, 2.0), (2, 2.0)]


@pytest.mark.parametrize("killed_before", ["a line", "the end"])
def test_a_run_outlives_wandbs_helper_process_and_goes_on_there_when_it_continues(
    recipe, tmp_path, monkeypatch, capsys, killed_before
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLogger(tmp_path, recipe, 0, 4, [])
    helpers = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    for helper in helpers:
        helper.terminate()
    assert helpers and not psutil.wait_procs(helpers, timeout=10)[1]
    if killed_before == "a line":
        log.write(LINE)
        log.write({**LINE, "step": 2})
    log.close()
    assert capsys.readouterr().err.count("nothing more goes there until the run continues") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == (killed_before == "a line") * 2
    log = MetricsLogger(tmp_path, recipe, 2, 4, [])
    log.write({**LINE, "step": 3})
    log.close()
    assert "nothing more" not in capsys.readouterr().err
    assert any(r.HasField("history") for r in records(max((tmp_path / "wandb").glob("offline-run-*"))))


def test_a_wandb_that_cannot_begin_is_said_and_the_log_does_without(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # a helper process that nobody can reach
    log = MetricsLogger(tmp_path, recipe, 0, 4, [])
    log.write(LINE)
    log.close()
    assert capsys.readouterr().err.count("nothing more goes there until the run continues") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_what_is_flushed_is_in_the_file(tmp_path):
    log = MetricsLogger(tmp_path, load_recipe("demo_emae"), 0, 4, [])
    log.file.write("here")
    log.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == "here"
    log.close()


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"\xff\xfe", b'{"loss": 2.0}', b"[2]", b""])
def test_a_damaged_line_costs_no_other_and_a_cut_last_one_nothing(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({**LINE, "step": step}).encode() for step in (1, 2, 3, 4)]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], lines[0][:9]]))
    MetricsLogger(tmp_path, load_recipe("demo_emae"), 3, 4, []).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert "metrics.jsonl: 1 lines cannot be read and are left out" in capsys.readouterr().err


def without_wandb(command: str, cold: bool = False) -> subprocess.CompletedProcess:
    """Run a command of `pipeline` as if wandb were not installed. cold: in a new interpreter."""
    code = "import sys, runpy; sys.modules['wandb'] = None; runpy.run_module('pipeline', run_name='__main__')"
    if not cold:
        return run(["-c", code, *command.split()], env=os.environ | {"DS_ACCELERATOR": "cpu"})
    return subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("tests", "train.wandb: the package wandb is not installed; pip install"), ("null", "nowhere does not")],
)
def test_without_the_package_wandb_one_line_says_so_where_the_recipe_asks_for_it(tmp_path, wanted, says):
    command = f"pretrain demo_emae --data nowhere --run {tmp_path}/run --set train.wandb={wanted}"
    ended = without_wandb(command, cold=True)
    assert ended.returncode == 2 and ended.stderr.startswith(f"pipeline: error: {says}")
    assert len(ended.stderr.splitlines()) == 1


def test_without_the_package_wandb_a_probe_that_asks_for_it_ends_before_it_begins(labelled_sets, tmp_path):
    sets = f"--data {labelled_sets[0]} --val {labelled_sets[1]}"
    ended = without_wandb(f"linprobe --weights pixels:24 {sets} --run {tmp_path}/run --set train.wandb=mine")
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("pipeline: error: "))
    assert ended.returncode == 2 and "train.wandb: the package wandb is not installed" in line
    assert not (tmp_path / "run").exists()


def test_who_is_not_logged_in_is_told_so(recipe, tmp_path, logged_in_nowhere):
    with pytest.raises(UserError, match=r"train\.wandb: .*wandb login"):
        wandb_logger.WandbLogger(tmp_path, recipe)


def test_a_server_out_of_reach_stops_no_training(recipe, tmp_path, logged_in_nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    found = wandb_logger.WandbLogger(tmp_path, recipe)
    found.close()
    assert found.run.offline and "cannot be reached" in found.said and "wandb sync" in found.said


def test_a_rank_that_holds_up_the_others_is_named_to_who_watches(recipe, tmp_path, capsys):
    log = MetricsLogger(tmp_path, load_recipe("demo_emae"), 0, 4, [])
    log.write(LINE)
    log.close()
    assert "slowest is rank 7 on node-9 (3.0 x the median)" in capsys.readouterr().err


def test_the_profiler_traces_the_chosen_steps_alone(tmp_path):
    profiler = Profiler(tmp_path, 3, 4, torch.device("cpu"))
    written = []
    for step in range(1, 7):
        profiler.begin(step)
        torch.full((step,), 1.0).cumsum(0)
        written.append(profiler.end(step))
    assert [path and path.name for path in written] == [
        None, None, None, "steps-00000003-00000004.json.gz", None, None,
    ]  # fmt: skip
    with gzip.open(written[3]) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 2


@pytest.mark.parametrize("steps", ["[0,2]", "[5,3]"])
def test_profile_steps_that_are_no_span_are_an_error(steps):
    with pytest.raises(UserError, match=r"train\.profile_steps: .* no first and last step"):
        load_recipe("demo_emae", [f"train.profile_steps={steps}"])
