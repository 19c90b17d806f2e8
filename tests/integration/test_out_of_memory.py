"""A GPU out of memory on one rank ends all ranks with exit code 2 and one line."""

import json
import subprocess
import time
from subprocess import PIPE

import pytest
from forkserver import ForkedProcess
from runs import FaultyRun, environment, rank_environments


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_exit_with_2_if_one_is_out_of_memory(shards, tmp_path, rank):
    """Also the one that waits for the other in an all_reduce."""
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "out of memory", "rank": rank, "steps": [6]}])
    arguments = run.arguments(train__steps=8, engine__precision="fp32")
    with open(run.output, "w") as output:
        ranks = [
            ForkedProcess(arguments, env=environment(**variables), stdout=output, stderr=subprocess.STDOUT)
            for variables in rank_environments(2)
        ]
    run.wait_for(ranks[1 - rank], lambda: len(run.metrics()) == 5)
    started = time.monotonic()
    assert [process.wait(60) for process in ranks] == [2, 2]
    assert time.monotonic() - started < 30
    (error,) = [line for line in run.output.read_text().splitlines() if line.startswith("pipeline: error: ")]
    assert f"engine.micro_batch: 4 needs more memory than the GPU of rank {rank} has" in error
    assert "engine.micro_batch=2" in error and "engine.activation_checkpointing=true" in error
    assert "saved at step 4" in error and "Traceback" not in run.output.read_text()
    assert json.loads((run.directory / "checkpoints/step-00000004/state.json").read_text())["step"] == 4


@pytest.mark.parametrize("rank", [0, 3])
def test_no_rank_ends_before_all_know_the_error(rank):
    """Otherwise a collective fails on another rank, which exits with 1, and Slurm starts the job again."""
    ranks = [
        ForkedProcess(["-m", "aborting_ranks", str(rank)], env=environment(**variables), stdout=PIPE, stderr=PIPE)
        for variables in rank_environments(4)
    ]
    errors = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == 4 * [2], errors
    lines = [[line for line in text.splitlines() if not line.startswith("[W")] for text in errors]  # c10d's warnings
    assert lines == [["pipeline: error: out of memory"], [], [], []]
