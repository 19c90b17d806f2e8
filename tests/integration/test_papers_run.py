"""`paper --run` with real runs: its table, a kill, and CIFAR-10."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from forkserver import ForkedProcess
from runs import environment

SMALL = {
    "model.name": "vit_tiny",
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 4,
    "model.patch_size": 8,
    "model.decoder_width": 32,
    "model.decoder_depth": 1,
    "model.decoder_heads": 4,
    "data.image_size": 32,
    "data.global_batch": 16,
    "engine.precision": "fp32",
    "engine.micro_batch": 16,
    "train.log_every": 1,
    "classifier.encoder": "null",
}
FORKED = shlex.join([sys.executable, str(Path(__file__).with_name("forked.py"))])
TABLE = "efficient_mae.table2"


def paper(directory: Path, name: str, data: Path, val: Path | None = None, **settings) -> list[str]:
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    evaluation = ["--val", str(val)] if val else []
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    return ["-m", "pipeline", "paper", name, "--run", str(directory), "--data", str(data), *evaluation, *sets]


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_killed_table_continues_and_repeats_nothing(labelled_sets, tmp_path):
    settings = {"train.steps": 60, "train.checkpoint_every": 4, "optim.warmup_steps": 2}
    command = [*paper(tmp_path / "papers", TABLE, labelled_sets[0], **settings), "--launcher", FORKED]
    with open(tmp_path / "output", "w") as output:
        process = ForkedProcess(command, env=environment(), stdout=output, stderr=output)
        while not (started := list((tmp_path / "papers").glob("pretrain-*/checkpoints/latest"))):
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (killed,) = {path.parents[1] for path in started}
    assert not list((tmp_path / "papers").glob("*.done.json"))

    finished = run_forked(command)
    assert finished.startswith(f"# {TABLE}")
    tree = json.loads((tmp_path / "papers" / f"{TABLE}.json").read_text())
    assert [row["published"]["loss"] for row in tree["rows"]] == [0.407, 0.486, 0.549]
    losses = [row["measured"]["loss"]["value"] for row in tree["rows"]]
    assert all(0 < loss < 10 for loss in losses) and len(set(losses)) == 3
    assert not any("finetune" in row["measured"] for row in tree["rows"])  # without --val
    assert steps_of(killed) == list(range(1, 61))
    starts = json.loads((killed / "environment.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] > 0  # resumed, not started again
    assert f"{losses[0]:.3f}" in finished

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "papers").glob("pretrain-*/*")}
    assert run_forked(command) == finished
    assert {path: path.stat().st_mtime_ns for path in before} == before  # no command was started again


def run_forked(command: list[str]) -> str:
    process = ForkedProcess(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return output


@pytest.mark.soak
def test_table_7_on_cifar10_survives_a_kill(tmp_path):
    """The documented miniature: real commands, pre-training and fine-tuning, killed once."""
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR is not set")
    for split in ("train", "test"):
        with tarfile.open(Path(os.environ["CIFAR10_DIR"]) / f"{split}.tar") as archive:
            members = [member for member in archive if member.isfile()]
            archive.extractall(tmp_path, members[:: len(members) // 2000], filter="data")
        subprocess.run(
            [sys.executable, "-m", "data_prep", "folder", tmp_path / split, tmp_path / f"{split}-set"], check=True
        )
    settings = {"optim.warmup_steps": 10, "pretrain.train.steps": 60, "finetune.train.steps": 40}
    settings |= {"engine.micro_batch": 32, "data.global_batch": 32, "model.patch_size": 4}
    arguments = paper(
        tmp_path / "papers", "efficient_mae.table7", tmp_path / "train-set", tmp_path / "test-set", **settings
    )
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, start_new_session=True, env=environment())
    while not list((tmp_path / "papers").glob("finetune-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "papers").glob("*.done.json"))) == 1
    subprocess.run(command, check=True, env=environment())
    tree = json.loads((tmp_path / "papers/efficient_mae.table7.json").read_text())
    accuracies = [row["measured"]["finetune"] for row in tree["rows"]]
    assert len(accuracies) == 6 and all(a["low"] < a["value"] < a["high"] for a in accuracies)
