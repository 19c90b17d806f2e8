"""Jobs as users submit them: the unchanged templates of slurm/, with a model that trains in seconds."""

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
JOB_STEPS = 120  # enough to be interrupted twice
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")


def require_slurm() -> None:
    """Skip the test if Slurm is not installed; with REQUIRE_SLURM set, as in .ci/run, fail instead."""
    missing = [program for program in ("slurmctld", "munged", "ip") if not shutil.which(program, path=PATH)]
    if missing and "REQUIRE_SLURM" in os.environ:
        pytest.fail(f"{', '.join(missing)} not found: install slurm-wlm, munge and iproute2")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: the packages slurm-wlm, munge and iproute2 have them")


class Job:
    """A run directory, and the environment that a user sets before sbatch."""

    def __init__(self, cluster, shards: Path, folder: Path, name: str = "run", **settings):
        self.cluster, self.run, self.output = cluster, folder / name, folder / f"{name}.out"
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
        """Wait until the job has ended. Returns Slurm's fields of it."""
        return self.cluster.wait(self.id, seconds, self.output)

    def train(self, template: str, *options: str, **environment: str) -> str:
        """Train to the end. Returns the job's log."""
        self.submit(template, *options, **environment)
        ended = self.wait()
        assert ended["JobState"] == "COMPLETED", self.log()
        return self.log()

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def describe(self) -> str:
        """Return what explains a failure: Slurm's fields of the job, its log, and the logs of the cluster."""
        return f"{self.cluster.job(self.id)}\n== job\n{self.log()[-4000:]}\n{self.cluster.logs()}"

    def losses(self) -> list[tuple[int, float]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def wait_until(condition, seconds: float, job: Job) -> None:
    """Wait for a condition, and start the job at once if it is requeued. Fails if the job ends before that."""
    deadline, checked = time.monotonic() + seconds, 0.0
    while not condition():
        assert time.monotonic() < deadline, job.describe()
        if time.monotonic() - checked > 1:
            assert not job.cluster.has_ended(job.id), job.describe()
            job.cluster.start_if_requeued(job.cluster.job(job.id))
            checked = time.monotonic()
        time.sleep(0.01)


def wait_for_steps(job: Job, steps: int) -> None:
    """Wait until the job has logged `steps` more steps than it has now."""
    target = len(job.losses()) + steps
    wait_until(lambda: len(job.losses()) >= target, 400, job)
