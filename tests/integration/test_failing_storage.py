"""A run whose storage fails under it: one line that names the shard, an exit code, and nothing hangs."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from data_prep.shard_set import read_manifest, tar_path

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
from http_store import serve
from runs import launch_processes

STARTING = 120  # seconds, on a busy machine
PATIENCE = {"data__timeout_s": 3, "data__retries": 2, "data__read_ahead_mb": 1}
BOUND = 3 * 3 + 0.5 + 1 + 15  # three tries, two waits, and a busy machine


def complaint(run, process, within, code=2):
    assert process.wait(within) == code, run.output.read_text()[-8000:]
    start = {2: "pipeline: error: ", 75: "pipeline: "}[code]
    (line,) = [line for line in run.output.read_text().splitlines() if line.startswith(start)]
    assert "Traceback" not in run.output.read_text()
    return line


def wait_for_steps(run, process):
    deadline = time.monotonic() + STARTING
    while len(run.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, run.output.read_text()[-4000:]
        time.sleep(0.05)


def test_a_server_that_stalls_for_good(run, shards):
    """It may answer the next start."""
    with serve(shards) as server:
        run.shards = server.url
        process = run.start(1, train__steps=10**6, **PATIENCE)
        wait_for_steps(run, process)
        server.only(".tar", "stall")
        line = complaint(run, process, BOUND, code=75)
    assert (run.directory / "checkpoints" / f"step-{run.metrics()[-1]['step']:08d}").exists()
    assert f"{server.url}/" in line and ".tar: cannot be read (tries: 3): no answer for 3 s" in line
    assert "warning: " in run.output.read_text() and "try 2 of 3" in run.output.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_that_is_truncated_under_a_run(run, shards, tmp_path, ranks):
    """However many ranks: they stop together, with everything saved."""
    run.launch = launch_processes  # exit codes that outlive the end of the interpreter and of its connections
    run.shards = shutil.copytree(shards, tmp_path / "set")
    process = run.start(ranks, train__steps=10**6, train__checkpoint_every=10**6, **PATIENCE)
    wait_for_steps(run, process)
    path = tar_path(run.shards, read_manifest(run.shards).shards[1])
    with open(path, "r+b") as file:
        file.truncate(4096)
    assert f"{path}: ends at byte 4,096" in complaint(run, process, BOUND)
    (saved,) = (run.directory / "checkpoints").glob("step-????????")
    assert int(saved.name[5:]) >= run.metrics()[-1]["step"] >= 3
