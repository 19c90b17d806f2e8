"""A run whose storage fails ends with one line that names the shard and an exit code, and no rank hangs."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from data_prep.shard_set import read_manifest, tar_path

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
from http_store import serve

MAX_START_S = 120  # on a busy machine
RETRY_POLICY = {"data__timeout_s": 3, "data__retries": 2, "data__read_ahead_mb": 1}
MAX_END_S = 3 * 3 + 0.5 + 1 + 15  # three attempts, two delays, and a busy machine


def error_line(run, process, timeout, code=2):
    assert process.wait(timeout) == code, run.output.read_text()[-8000:]
    prefix = {2: "pipeline: error: ", 75: "pipeline: "}[code]
    (line,) = [line for line in run.output.read_text().splitlines() if line.startswith(prefix)]
    assert "Traceback" not in run.output.read_text()
    return line


def wait_for_steps(run, process):
    deadline = time.monotonic() + MAX_START_S
    while len(run.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, run.output.read_text()[-4000:]
        time.sleep(0.05)


def test_server_that_stalls_stops_the_run_with_75(run, shards):
    """The next start may succeed."""
    with serve(shards) as server:
        run.shards = server.url
        process = run.start(1, train__steps=10**6, **RETRY_POLICY)
        wait_for_steps(run, process)
        server.fail(".tar", "stall")
        line = error_line(run, process, MAX_END_S, code=75)
    assert (run.directory / "checkpoints" / f"step-{run.metrics()[-1]['step']:08d}").exists()
    assert f"{server.url}/" in line and ".tar: " in line and "tries: 3" in line
    assert " WARNING rank 0] " in run.output.read_text() and "try 2 of 3" in run.output.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_truncated_shard_stops_all_ranks_with_2(run, shards, tmp_path, ranks):
    run.shards = shutil.copytree(shards, tmp_path / "set")
    process = run.start(ranks, train__steps=10**6, train__checkpoint_every=10**6, **RETRY_POLICY)
    wait_for_steps(run, process)
    path = tar_path(run.shards, read_manifest(run.shards).shards[1])
    with open(path, "r+b") as file:
        file.truncate(4096)
    assert f"{path}: ends at byte 4,096" in error_line(run, process, MAX_END_S)
    (saved,) = (run.directory / "checkpoints").glob("step-????????")
    assert int(saved.name[5:]) >= run.metrics()[-1]["step"] >= 3
