"""Test the papers' claims in miniature, with intervals over seeds: the experiments of benchmarks/study_claims.py.

    CIFAR10_DIR=... IMAGENET_SAMPLE_DIR=... python benchmarks/study.py OUT                 hours on two CPU cores
    CIFAR10_DIR=... python benchmarks/study.py OUT --only E1 E2 [--seeds 5]
    python benchmarks/study.py OUT --row "MAE 0.9" --seed 1                                one row and seed

Every row runs as `python -m pipeline paper` runs its rows: the commands pretrain, linprobe, knn and finetune, each with
a record OUT/runs/COMMAND-DIGEST.done.json. If interrupted or killed, repeat the command: it runs what has no record.
The records are all that is needed: copied to another OUT, they continue the study there. Run directories are
deleted when a row has all its records.

First, every method's learning rate is chosen by a linear probe of trials on held-out training images. Then the rows
run one seed after another, one on each core, so that an interruption leaves complete seeds. OUT/study.md and a plot
for each experiment are written after each row. With a GPU, the same command trains ten times as long (`--size`).

CIFAR10_DIR contains train.tar and test.tar with <split>/<class>/<number>.jpg, IMAGENET_SAMPLE_DIR photographs.
"""

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from study_claims import (
    BASE_LRS,
    FINETUNE_LABELS,
    FINETUNING,
    IMAGE_SIZE,
    LABELS,
    METHODS,
    MODEL,
    ROWS,
    STEP_SIZES,
    STUDIES,
    TRIAL_SEED,
    UNIT,
    UNIT_STEPS,
    Weights,
)
from study_report import Results, format_speed, format_study, plot_study
from tqdm import tqdm

from pipeline.errors import StoppedEarly, UserError
from pipeline.io.atomic import atomic_write, read_json, write_json
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.papers.commands import Command, plan_experiment
from pipeline.papers.experiment import Experiment, Features, Row
from pipeline.papers.runner import run_experiment
from pipeline.recipe import Recipe, load_recipe

BATCH = 32
TRAIN, VALID, TEST, PHOTOS = (f"../shards/{name}" for name in ("train", "valid", "test", "photos"))
NUM_PICTURES, NUM_MASKS = 64, 5
HAS_GPU = torch.cuda.is_available()
ONE_CORE = () if HAS_GPU else ("data.decode_threads=1",)
NUM_PARALLEL = 1 if HAS_GPU else len(os.sched_getaffinity(0))
EVALUATION_COST = 1.2
"""Duration of a row's evaluations in units of UNIT's pre-training, for the progress bar."""


class Planner:
    """The experiments of `pipeline paper` that make and evaluate weights.

    A row needs two: one trains on the row's images, one evaluates the trained weights on CIFAR-10.
    """

    def __init__(self, size: float, runs: Path) -> None:
        self.size, self.runs = size, runs

    def settings(self, row: Weights, base_lr: str | None = None) -> tuple[str, ...]:
        """Return the overrides of a row's pre-training recipe; `base_lr` instead of the chosen one for a trial."""
        steps = max(1, round(UNIT_STEPS * self.size * self.units(row)))
        settings = (*MODEL, *ONE_CORE, f"data.image_size={IMAGE_SIZE[row.size]}", *row.settings)
        settings += (f"train.steps={steps}", f"optim.warmup_steps={steps // 20}")
        if row.tuned_as:
            settings += (f"optim.base_lr={base_lr or self.choose_lr(row.tuned_as)}",)
        return settings

    def units(self, row: Weights) -> float:
        """Return the images of a row's pre-training in units of UNIT_STEPS batches."""
        if not row.compute_of:
            return row.images
        reference = ROWS[row.compute_of]
        return self.units(reference) * self.flops(reference) / self.flops(row)

    def flops(self, row: Weights) -> float:
        """Return the operations of a forward pass, per image."""
        return forward_flops(self._recipe(row), BATCH)

    def _recipe(self, row: Weights) -> Recipe:
        size = f"data.image_size={IMAGE_SIZE[row.size]}"
        return load_recipe("vitb16_mae", (*MODEL, size, *row.settings, "train.steps=1", "optim.warmup_epochs=null"))

    def pretraining(self, row: Weights, seed: int, base_lr: str | None = None) -> Experiment:
        settings = (*self.settings(row, base_lr), f"seed={seed}")
        name = _file_name(f"pretrain {row.name} {base_lr or ''} {seed}")
        return Experiment(name, row.name, "", ("loss",), (Row(row.name, {}, settings),), "vitb16_mae")

    def evaluation(self, row: Weights, seed: int, base_lr: str | None = None) -> Experiment:
        """Return the evaluation of a row, or of a trial, which is a linear probe alone."""
        columns = ("linprobe",) if base_lr else ("linprobe", "knn") if row.weights else ("linprobe", "knn", "finetune")
        weights = row.weights or _pretrain_command(self.pretraining(row, seed, base_lr)).run
        size, (labels, epochs) = IMAGE_SIZE[row.size], FINETUNE_LABELS[row.size]
        tuning = (*FINETUNING, *ONE_CORE, f"data.image_size={size}", f"evaluation.resize={size}", f"seed={seed}")
        tuning += (f"data.subset={labels}", f"train.epochs={epochs}")
        features = Features("class_token" if row.weights else "mean", LABELS, None, 32 if row.weights else size)
        return Experiment(
            name=_file_name(f"evaluate {row.name} {base_lr or ''} {seed}"),
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

    def choose_lr(self, method: str) -> str:
        """Return the learning rate of the best trial. Raises UserError if not all have been run."""
        row = trial_row(method)
        scores = {lr: self.read(row, TRIAL_SEED, lr).get("linprobe") for lr in BASE_LRS}
        if None in scores.values():
            raise UserError(f"{method}: its trials have not been run; run the study without --row")
        return max(scores, key=lambda lr: scores[lr])

    def records(self, row: Weights, seed: int, base_lr: str | None = None) -> list[Path]:
        """Return the files with the results of a row and seed, or of a trial."""
        commands = list(plan_experiment(self.evaluation(row, seed, base_lr), _probe_settings(seed))[0].commands)
        if not row.weights:
            commands.insert(0, _pretrain_command(self.pretraining(row, seed, base_lr)))
        files = [self.runs / f"{command.run}.done.json" for command in commands]
        if row.has_disagreement and not base_lr:
            files.append(self.runs / f"agreement-{commands[0].run}.done.json")
        return files

    def read(self, row: Weights, seed: int, base_lr: str | None = None) -> dict[str, float]:
        """Return the results of a row and seed, or of a trial, as far as there are any."""
        results = [read_json(path)["result"] for path in self.records(row, seed, base_lr) if path.exists()]
        return {measure: values[0] for result in results for measure, values in result.items()}

    def is_done(self, row: Weights, seed: int, base_lr: str | None = None) -> bool:
        return all(path.exists() for path in self.records(row, seed, base_lr))


def trial_row(method: str) -> Weights:
    """Return the row of a method's trials; all methods' trials have the same compute."""
    return ROWS[METHODS[method]]._replace(compute_of=UNIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="experiments (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--size", type=float, default=10 if HAS_GPU else 1, help="factor of the images to train on")
    parser.add_argument("--row", choices=ROWS, help="run only this row, in the foreground")
    parser.add_argument("--seed", type=int, default=0, help="of --row")
    parser.add_argument("--trial", metavar="LR", help="run a trial of --row with this base learning rate")
    parser.add_argument("--report", action="store_true", help="only write the tables and plots")
    options = parser.parse_args()
    try:
        _run(options)
    except StoppedEarly as error:
        print(error, file=sys.stderr)
        sys.exit(75)
    except UserError as error:
        sys.exit(f"error: {error}")


def _run(options: argparse.Namespace) -> None:
    runs = options.out.absolute() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    planner = Planner(options.size, runs)
    if options.report:
        _write_report(options.out, options.only, planner, options.seeds)
        return
    wanted = [ROWS[name] for name in dict.fromkeys(row for study in options.only for row in STUDIES[study].rows)]
    if options.row:
        wanted = [ROWS[options.row]]
    _build_shards(options.out, any(row.size == "photos" for row in wanted))
    if options.row:
        row, seed = (trial_row(wanted[0].tuned_as), TRIAL_SEED) if options.trial else (wanted[0], options.seed)
        _run_row(planner, row, seed, options.trial)
        return
    for size in STEP_SIZES if "E3" in options.only else ():
        _time_step(runs, size)
    trials = [
        (trial_row(method), TRIAL_SEED, lr)
        for lr in BASE_LRS
        for method in METHODS
        if any(row.tuned_as == method for row in wanted)
    ]
    _run_all(planner, trials, options.out, lambda: None)
    tasks = [(row, seed, None) for seed in range(options.seeds) for row in wanted]
    report = lambda: _write_report(options.out, options.only, planner, options.seeds)  # noqa: E731
    _run_all(planner, tasks, options.out, report)
    report()
    print((options.out / "study.md").read_text())


def _run_all(
    planner: Planner, tasks: Sequence[tuple[Weights, int, str | None]], out: Path, report: Callable[[], None]
) -> None:
    """Run the tasks without records, NUM_PARALLEL at a time, each in a process of its own, in their order."""
    costs = {task: planner.units(task[0]) * planner.flops(task[0]) for task in tasks if not task[0].weights}
    unit = planner.flops(ROWS[UNIT])
    costs = {task: costs.get(task, 0) / unit + EVALUATION_COST for task in tasks}
    missing = [task for task in tasks if not planner.is_done(*task)]
    done = sum(costs[task] for task in tasks if task not in missing)
    bar = tqdm(total=round(sum(costs.values()), 1), initial=round(done, 1), desc="study", unit="unit")
    lock, processes, is_stopping = threading.Lock(), set(), threading.Event()

    def run(task: tuple[Weights, int, str | None]) -> None:
        row, seed, lr = task
        words = [sys.executable, __file__, str(out), "--size", str(planner.size), "--row", row.name]
        words += ["--trial", lr] if lr else ["--seed", str(seed)]
        with lock:
            if is_stopping.is_set():
                return
            bar.write(f"{time.strftime('%H:%M:%S')} {row.name}, {f'trial {lr}' if lr else f'seed {seed}'}")
            process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            processes.add(process)
        _, log = process.communicate()
        with lock:
            processes.discard(process)
            if process.returncode and not is_stopping.is_set():
                raise UserError(f"{row.name}, seed {seed}: failed with exit code {process.returncode}\n{log[-3000:]}")
            bar.update(costs[task])
            if not is_stopping.is_set():
                report()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, stop)
    try:
        with ThreadPoolExecutor(NUM_PARALLEL) as pool, bar:
            try:
                finished, _ = wait([pool.submit(run, task) for task in missing], return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                is_stopping.set()
                for process in list(processes):
                    process.terminate()
                raise
    except KeyboardInterrupt:
        raise StoppedEarly("stopped; run the same command again to continue") from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _run_row(planner: Planner, row: Weights, seed: int, trial: str | None) -> None:
    """Run what has no record of a row and seed, or of a trial, and delete its run directories."""
    _stop_with_parent()
    if planner.is_done(row, seed, trial):
        return
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if ONE_CORE:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(planner.runs)  # the records have relative paths
    here, evaluation = Path("."), planner.evaluation(row, seed, trial)
    experiments = [evaluation]
    run = None
    if not row.weights:
        pretraining = planner.pretraining(row, seed, trial)
        experiments.insert(0, pretraining)
        run = here / _pretrain_command(pretraining).run
        if not run.exists():  # the records come from another machine
            run.with_name(f"{run.name}.done.json").unlink(missing_ok=True)
        run_experiment(pretraining, here, PHOTOS if row.size == "photos" else TRAIN, None, (), "python -m")
        if row.has_disagreement and not trial:
            _measure_agreement(run)
    val = VALID if trial else TEST
    run_experiment(evaluation, here, TRAIN, val, _probe_settings(seed), "python -m")
    for experiment in experiments:  # its table has only this row
        for suffix in ("json", "md"):
            (here / f"{experiment.name}.{suffix}").unlink()
    for command in plan_experiment(evaluation, _probe_settings(seed))[0].commands:
        shutil.rmtree(here / command.run, ignore_errors=True)
    if run:
        shutil.rmtree(run)


def _measure_agreement(run: Path) -> None:
    """Record the disagreement of a run's predictions behind several masks."""
    record = run.with_name(f"agreement-{run.name}.done.json")
    if record.exists():
        return
    arguments = ["reconstruct", str(run), "--images", "../pictures", "--out", str(run / "agreement.png")]
    arguments += ["--kind", "agreement", "--count", str(NUM_PICTURES), "--seeds", str(NUM_MASKS)]
    command = [sys.executable, "-m", "pipeline", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"disagreement ([\d.]+), error ([\d.]+) levels of 255", output)
    assert found, output
    result = {"disagreement": [float(found[1])], "error": [float(found[2])]}
    write_json(record, {"command": arguments, "result": result})


def _time_step(runs: Path, image_size: int) -> None:
    """Record the time of a training step of MAE and LoMaR."""
    record = _step_record(runs, image_size)
    if not record.exists():
        batch = 64 if HAS_GPU else 1
        script = Path(__file__).with_name("step_448.py")
        words = [sys.executable, str(script), "--image-size", str(image_size), "--batch", str(batch), "--rounds", "8"]
        result = subprocess.run([*words, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
        write_json(record, json.loads(result))


def _step_record(runs: Path, image_size: int) -> Path:
    return runs / f"step-{image_size}.done.json"


def _probe_settings(seed: int) -> list[str]:
    threads = ["linprobe.data.decode_threads=1"] if ONE_CORE else []
    return [f"linprobe.seed={seed}", "linprobe.data.global_batch=1024", "linprobe.data.holdout=0.04", *threads]


def _pretrain_command(experiment: Experiment) -> Command:
    return plan_experiment(experiment)[0].commands[0]


def _stop_with_parent() -> None:
    """Send this process SIGTERM if its parent is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _build_shards(out: Path, with_photos: bool) -> None:
    """Build the shard sets train (nine tenths of the training images), valid and test, photos, and the pictures."""
    shards, pictures = out / "shards", out / "pictures"
    if not pictures.exists():
        cifar = _data_folder("CIFAR10_DIR", "train.tar and test.tar of CIFAR-10")
        _build(cifar / "test.tar", shards / "test")
        with tarfile.open(cifar / "train.tar") as archive:
            members = [member for member in archive if member.isfile()]
            held_out = [member for member in members if int(Path(member.name).stem) % 10 == 9]
            _build_part(archive, held_out, shards / "valid")
            _build_part(archive, sorted(set(members) - set(held_out), key=lambda m: m.name), shards / "train")
        with tarfile.open(cifar / "test.tar") as archive:
            members = sorted((m for m in archive if m.isfile()), key=lambda member: Path(member.name).stem)
            new = pictures.with_name("pictures.new")
            new.mkdir(exist_ok=True)
            for member in members[:NUM_PICTURES]:
                (new / member.name.replace("/", "-")).write_bytes(archive.extractfile(member).read())
        new.rename(pictures)
    if with_photos:
        _build(_data_folder("IMAGENET_SAMPLE_DIR", "photographs"), shards / "photos", "--resize", "128")


def _build_part(archive: tarfile.TarFile, members: list[tarfile.TarInfo], out: Path) -> None:
    part = out.with_suffix(".tar")
    part.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w") as output:
        for member in members:
            output.addfile(member, archive.extractfile(member))
    _build(part, out)
    part.unlink()


def _build(source: Path, out: Path, *options: str) -> None:
    if not (out / "manifest.json").exists():
        words = [sys.executable, "-m", "data_prep", "folder", str(source), str(out), "--shard-size", "2500", *options]
        result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if result.returncode:
            raise UserError(f"{out}: cannot be built: {result.stderr[-1000:]}; fix it, and run the same command again")


def _data_folder(variable: str, content: str) -> Path:
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        raise UserError(f"{variable}: names no folder; set it to the folder with {content}")
    return folder


def _write_report(out: Path, studies: Sequence[str], planner: Planner, num_seeds: int) -> None:
    parts = []
    for name in studies:
        study = STUDIES[name]
        results, compute, images = _collect(planner, study.rows, num_seeds)
        plot_study(study, results, out / f"{name}.png")
        parts.append(format_study(name, study, results, compute, images))
        if name == "E3":
            records = {size: _step_record(planner.runs, size) for size in STEP_SIZES}
            parts.append(format_speed({size: read_json(path) for size, path in records.items() if path.exists()}))
    atomic_write(out / "study.md", "\n".join([*parts, _format_trials(planner)]))


def _collect(planner: Planner, rows: Sequence[str], num_seeds: int) -> tuple[Results, dict[str, float], dict[str, int]]:
    """Return the results of the rows, and the operations (10^15) and images of their pre-training."""
    results: Results = {}
    compute, images = {}, {}
    for name in rows:
        row = ROWS[name]
        units = 0 if row.weights else planner.units(row)
        images[name] = round(units * UNIT_STEPS * planner.size) * BATCH
        compute[name] = training_flops(planner.flops(row)) * images[name] / 1e15 if units else 0.0
        values = {seed: planner.read(row, seed) for seed in range(num_seeds)}
        results[name] = {seed: value for seed, value in values.items() if value}
    return results, compute, images


def _format_trials(planner: Planner) -> str:
    lines = ["### Learning rates", "", f"| method | {' | '.join(BASE_LRS)} |", "| --- " * (1 + len(BASE_LRS)) + "|"]
    for method in METHODS:
        scores = [planner.read(trial_row(method), TRIAL_SEED, lr).get("linprobe") for lr in BASE_LRS]
        cells = ["" if score is None else f"{score:.1f}" for score in scores]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


if __name__ == "__main__":
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    main()
