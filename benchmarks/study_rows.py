"""Run one row of the study with one seed: its experiments of `pipeline paper`, and the records of their results.

Invariant: a job whose records exist is not run again, and records do not depend on the folder that they are in.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from study_claims import (
    BASE_LRS,
    BATCH,
    FINETUNE_LABELS,
    FINETUNING,
    IMAGE_SIZE,
    LABELS,
    METHODS,
    MODEL,
    ROWS,
    TASKS,
    TRIAL_SEED,
    UNIT,
    UNIT_STEPS,
    Weights,
)

from pipeline.errors import Diverged, UserError
from pipeline.io.atomic import atomic_write, read_json, write_json
from pipeline.methods.flops import forward_flops
from pipeline.papers.commands import Command, plan_experiment
from pipeline.papers.experiment import Experiment, Features, Row
from pipeline.papers.runner import run_experiment
from pipeline.recipe import load_recipe

SHARDS = "../shards"
TRAIN, VALID, TEST, PHOTOS = (f"{SHARDS}/{name}" for name in ("train", "valid", "test", "photos"))
NUM_PICTURES, NUM_MASKS = 64, 5
HAS_GPU = torch.cuda.is_available()
ONE_CORE = () if HAS_GPU else ("data.decode_threads=1",)
EVALUATION_COST = 1.2
"""Duration of a row's evaluations in units of UNIT's pre-training, for the progress bar."""


class Job(NamedTuple):
    row: Weights
    seed: int
    trial: str = ""
    """Base learning rate of a trial; empty: the method's chosen one."""

    def __str__(self) -> str:
        return f"{self.row.name}, {f'trial {self.trial}' if self.trial else f'seed {self.seed}'}"


def trial_job(method: str, base_lr: str) -> Job:
    """Return a trial of a method; all methods' trials have the same compute."""
    return Job(ROWS[METHODS[method]]._replace(compute_of=UNIT), TRIAL_SEED, base_lr)


class Planner:
    """The experiments of `pipeline paper` that make and evaluate weights.

    A row needs two: one trains on the row's images, one evaluates the trained weights on CIFAR-10.
    """

    def __init__(self, size: float, runs: Path) -> None:
        self.size, self.runs = size, runs
        self._base_lrs: dict[str, str] = {}  # that have been chosen, by method

    def units(self, row: Weights) -> float:
        """Return the images of a row's pre-training in units of UNIT_STEPS batches."""
        if row.weights or row.task:
            return 0.0
        if not row.compute_of:
            return row.images
        reference = ROWS[row.compute_of]
        return self.units(reference) * self.flops(reference) / self.flops(row)

    def flops(self, row: Weights) -> float:
        """Return the operations of a forward pass, per image."""
        settings = (*MODEL, f"data.image_size={IMAGE_SIZE[row.size]}", *row.settings, "train.steps=1")
        return forward_flops(load_recipe("vitb16_mae", (*settings, "optim.warmup_epochs=null")), BATCH)

    def cost(self, job: Job) -> float:
        """Return the expected duration in units of UNIT's pre-training."""
        if job.row.task:
            return TASKS[job.row.task].cost
        return self.units(job.row) * self.flops(job.row) / self.flops(ROWS[UNIT]) + EVALUATION_COST

    def pretraining(self, job: Job) -> Experiment:
        row, seed, trial = job
        steps = max(1, round(UNIT_STEPS * self.size * self.units(row)))
        settings = (*MODEL, *ONE_CORE, f"data.image_size={IMAGE_SIZE[row.size]}", *row.settings)
        settings += (f"train.steps={steps}", f"optim.warmup_steps={steps // 20}")
        if row.tuned_as:
            settings += (f"optim.base_lr={trial or self.choose_lr(row.tuned_as)}",)
        row_of_paper = Row(row.name, {}, (*settings, f"seed={seed}"))
        return Experiment(f"pretrain-{_file_name(job)}", row.name, "", ("loss",), (row_of_paper,), "vitb16_mae")

    def evaluation(self, job: Job) -> Experiment:
        """Return the evaluation of a row, or of a trial, which is a linear probe alone."""
        row, seed, trial = job
        columns = ("linprobe",) if trial else ("linprobe", "knn") if row.weights else ("linprobe", "knn", "finetune")
        weights = row.weights or self.pretrain_command(job).run
        size, (labels, epochs) = IMAGE_SIZE[row.size], FINETUNE_LABELS[row.size]
        tuning = (*FINETUNING, *ONE_CORE, f"data.image_size={size}", f"evaluation.resize={size}", f"seed={seed}")
        tuning += (f"data.subset={labels}", f"train.epochs={epochs}")
        features = Features("class_token" if row.weights else "mean", LABELS, None, 32 if row.weights else size)
        return Experiment(
            name=f"evaluate-{_file_name(job)}",
            title=row.name,
            source="",
            columns=columns,
            rows=(Row(row.name, {}, ("train.steps=1",), finetune_settings=tuning, weights=weights),),
            recipe="vitb16_mae",
            finetune_recipe="finetune_tiny",
            probe_epochs=60,
            probe_lrs=(1.0, 3.0, 10.0, 30.0),
            center_crops=True,
            features=features,
        )

    def pretrain_command(self, job: Job) -> Command:
        return plan_experiment(self.pretraining(job))[0].commands[0]

    def evaluation_commands(self, job: Job) -> list[Command]:
        return list(plan_experiment(self.evaluation(job), probe_settings(job.seed))[0].commands)

    def choose_lr(self, method: str) -> str:
        """Return the learning rate of the best trial. Raises UserError if not all have been run."""
        if method not in self._base_lrs:
            trials = {lr: trial_job(method, lr) for lr in BASE_LRS}
            if not all(self.is_done(job) for job in trials.values()):
                raise UserError(f"{method}: its trials have not been run; run the study without --row")
            scores = {lr: self.read(job).get("linprobe", 0.0) for lr, job in trials.items()}  # 0: it diverged
            self._base_lrs[method] = max(scores, key=lambda lr: scores[lr])
        return self._base_lrs[method]

    def records(self, job: Job) -> list[Path]:
        """Return the files with the results of a job."""
        if job.row.task:
            return [self.runs / f"{_file_name(job)}.done.json"]
        names = [command.run for command in self.evaluation_commands(job)]
        if not job.row.weights:
            run = self.pretrain_command(job).run
            names += [run, *([f"agreement-{run}"] if job.row.has_disagreement and not job.trial else [])]
        return [self.runs / f"{name}.done.json" for name in names]

    def read(self, job: Job) -> dict[str, float]:
        """Return the results of a job, as far as there are any."""
        results = [read_json(path)["result"] for path in self.records(job) if path.exists()]
        return {measure: values[0] for result in results for measure, values in result.items()}

    def is_done(self, job: Job) -> bool:
        return all(path.exists() for path in self.records(job))


def run_job(planner: Planner, job: Job) -> None:
    """Run what has no record of a job, and delete its run directories."""
    _stop_with_parent()
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if ONE_CORE:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(planner.runs)  # the records have relative paths
    if planner.is_done(job):
        return
    try:
        if job.row.task:
            _run_task(planner, job)
        else:
            _run_experiments(planner, job)
    except Diverged:
        for record in planner.records(job):
            if not record.exists():
                write_json(record, {"diverged": True, "result": {}})


def _run_experiments(planner: Planner, job: Job) -> None:
    row, here, evaluation = job.row, Path("."), planner.evaluation(job)
    created = [command.run for command in planner.evaluation_commands(job)]
    tables = [evaluation.name]
    if not row.weights:
        pretraining, run = planner.pretraining(job), planner.pretrain_command(job).run
        if not Path(run).exists():  # its record comes from another machine
            Path(f"{run}.done.json").unlink(missing_ok=True)
        run_experiment(pretraining, here, PHOTOS if row.size == "photos" else TRAIN, None, (), "python -m")
        if row.has_disagreement and not job.trial:
            _measure_agreement(run)
        created.append(run)
        tables.append(pretraining.name)
    run_experiment(evaluation, here, TRAIN, VALID if job.trial else TEST, probe_settings(job.seed), "python -m")
    for name in created:
        shutil.rmtree(name, ignore_errors=True)
    for name in tables:  # it has only this row
        for suffix in ("json", "md"):
            Path(f"{name}.{suffix}").unlink(missing_ok=True)


def _measure_agreement(run: str) -> None:
    """Record the disagreement of a run's predictions behind several masks."""
    record = Path(f"agreement-{run}.done.json")
    if record.exists():
        return
    arguments = ["reconstruct", run, "--images", f"{SHARDS}/pictures", "--out", f"{run}/agreement.png"]
    arguments += ["--kind", "agreement", "--count", str(NUM_PICTURES), "--seeds", str(NUM_MASKS)]
    output = run_command("pipeline", *arguments)
    found = re.search(r"disagreement ([\d.]+), error ([\d.]+) levels of 255", output)
    assert found, output
    write_json(record, {"command": arguments, "result": {"disagreement": [float(found[1])]}})


def _run_task(planner: Planner, job: Job) -> None:
    """Fine-tune on a dense task, from pre-trained weights or from those before the pre-training."""
    row, task, name = job.row, TASKS[job.row.task], _file_name(job)
    photographs, train, val = (f"{SHARDS}/{row.task}-{part}" for part in ("photographs", "train", "val"))
    settings = [f"--set={setting}" for setting in ("engine.micro_batch=8", f"seed={job.seed}", *ONE_CORE)]
    if row.weights:
        atomic_write(Path(f"{name}.yaml"), load_recipe("demo_emae", [f"seed={job.seed}"]).to_yaml())
        weights = f"random:{name}.yaml"
    else:
        weights = f"{name}-weights"
        steps = round(task.pretrain_steps * planner.size)
        arguments = ["demo_emae", "--data", photographs, "--run", weights, *settings, f"--set=train.steps={steps}"]
        run_command("pipeline", "pretrain", *arguments)
    arguments = [row.task, "--weights", weights, "--data", train, "--val", val, "--run", name, *settings]
    run_command("pipeline", "finetune", *arguments, *(f"--set={setting}" for setting in task.settings))
    of_training = json.loads(run_command("pipeline", "evaluate", name, "--val", train, "--json"))
    result = {
        task.measure: [100 * read_json(Path(name) / "results.json")[task.measure]],
        f"{task.measure}_of_training": [100 * of_training[task.measure]],
    }
    write_json(planner.records(job)[0], {"command": ["finetune", *arguments, *task.settings], "result": result})
    shutil.rmtree(name)
    shutil.rmtree(f"{name}-weights", ignore_errors=True)
    Path(f"{name}.yaml").unlink(missing_ok=True)


def time_step(runs: Path, image_size: int) -> None:
    """Record the time of a training step of MAE and LoMaR."""
    record = step_record(runs, image_size)
    if not record.exists():
        script = Path(__file__).with_name("step_448.py")
        words = [sys.executable, str(script), "--image-size", str(image_size), "--batch", "64" if HAS_GPU else "1"]
        words += ["--rounds", "8", "--json"]
        output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        write_json(record, json.loads(output))


def step_record(runs: Path, image_size: int) -> Path:
    return runs / f"step-{image_size}.done.json"


def probe_settings(seed: int) -> list[str]:
    """Return the overrides of the linear probe."""
    settings = ("data.global_batch=1024", "data.holdout=0.04", f"seed={seed}", *ONE_CORE)
    return [f"linprobe.{setting}" for setting in settings]


def run_command(program: str, *arguments: str) -> str:
    """Run a command of this package and return its stdout. Raises UserError if it fails."""
    words = [sys.executable, "-m", program, *arguments]
    environment = {**os.environ, "SHARDMAE_WATCH_PARENT": "1"}
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        raise UserError(
            f"`{program} {arguments[0]}`: ended with exit code {result.returncode}; fix what it printed above, and run "
            "the same command again"
        )
    return result.stdout


def _stop_with_parent() -> None:
    """Send this process SIGTERM if its parent is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _file_name(job: Job) -> str:
    return re.sub(r"[^\w.]+", "-", str(job))
