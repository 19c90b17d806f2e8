"""Jobs as users submit them: the templates in slurm/, unchanged, with a model that trains in seconds."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from runs import SMALL

ROOT = Path(__file__).parents[2]
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
TINY = {**SMALL, "model.name": "vit_tiny", "model.patch_size": 8, "model.heads": 4, "model.decoder_heads": 4}
TINY |= {"model.decoder_depth": 1, "engine.precision": "fp32", "optim.warmup_steps": 4}
TINY |= {"model.width": 64, "train.checkpoint_every": 25}
JOB_STEPS = 300
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")


def needs_slurm() -> None:
    """Skip where Slurm is not installed, but never where it has to be: .ci/run says so."""
    missing = [program for program in ("slurmctld", "munged", "ip") if not shutil.which(program, path=PATH)]
    if missing and "REQUIRE_SLURM" in os.environ:
        pytest.fail(f"{', '.join(missing)} not found: install slurm-wlm, munge and iproute2")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: the packages slurm-wlm, munge and iproute2 have them")


class Job:
    """One run directory, and the environment that a user sets before sbatch."""

    def __init__(self, cluster, shards: Path, place: Path, name: str = "run", **settings):
        self.cluster, self.run, self.output = cluster, place / name, place / f"{name}.out"
        sets = TINY | {key.replace("__", "."): value for key, value in settings.items()}
        self.environment = {
            "SHARDMAE": str(ROOT),
            "VENV": sys.prefix,
            "DATA": str(shards),
            "RUN": str(self.run),
            "SETS": " ".join(f"{key}={value}" for key, value in sets.items()),
            "OMP_NUM_THREADS": "1",
        }
        self.id = ""

    def submit(self, template: str, *options: str, **environment: str) -> str:
        command = (f"--output={self.output}", *ON_TWO_NODES, *options, ROOT / "slurm" / template)
        self.id = self.cluster.submit(*command, **self.environment | environment)
        return self.id

    def wait(self, seconds: float = 600) -> dict[str, str]:
        """Wait until the job has ended; what Slurm says of it."""
        return self.cluster.wait(self.id, seconds, self.output)

    def train(self, template: str, *options: str, **environment: str) -> str:
        """Train to the end; what the job said."""
        self.submit(template, *options, **environment)
        ended = self.wait()
        assert ended["JobState"] == "COMPLETED", self.said()
        return self.said()

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def losses(self) -> list[tuple[int, float]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def until(condition, seconds, job):
    """Wait for a condition while the job is not over, and let it start at once when it was put back."""
    deadline, looked = time.monotonic() + seconds, 0.0
    while not condition():
        assert time.monotonic() < deadline, job.said()[-4000:]
        if time.monotonic() - looked > 1:
            assert not job.cluster.has_ended(job.id), job.said()[-4000:]
            job.cluster.hurry(job.cluster.job(job.id))
            looked = time.monotonic()
        time.sleep(0.01)


def train_on(job, steps):
    """Wait until the job has logged so many steps more than it has now."""
    wanted = len(job.losses()) + steps
    until(lambda: len(job.losses()) >= wanted, 400, job)
