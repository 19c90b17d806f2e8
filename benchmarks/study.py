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

CIFAR10_DIR contains train.tar and test.tar with <split>/<class>/<number>.jpg, IMAGENET_SAMPLE_DIR (for E3) photographs;
E4 needs COCO_DIR and ADE_DIR, in the layout of COCO and of ADEChallengeData2016.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from study_claims import BASE_LRS, BATCH, METHODS, ROWS, STEP_SIZES, STUDIES, TASKS, UNIT_STEPS, Weights
from study_report import Results, format_speed, format_study, plot_study
from study_rows import HAS_GPU, NUM_PICTURES, Job, Planner, run_command, run_job, step_record, time_step, trial_job
from tqdm import tqdm

from pipeline.errors import StoppedEarly, UserError
from pipeline.io.atomic import atomic_write, read_json
from pipeline.methods.flops import training_flops

NUM_PARALLEL = 1 if HAS_GPU else len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="experiments (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--size", type=float, default=10 if HAS_GPU else 1, help="factor of the images to train on")
    parser.add_argument("--row", choices=ROWS, help="run only this row, in the foreground")
    parser.add_argument("--seed", type=int, default=0, help="of --row (default: 0)")
    parser.add_argument("--trial", metavar="LR", choices=BASE_LRS, help="run a trial of --row with this learning rate")
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
    out, runs = options.out, options.out.absolute() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    planner = Planner(options.size, runs)
    if options.report:
        _write_report(out, options.only, planner, options.seeds)
        return
    names = [options.row] if options.row else [name for study in options.only for name in STUDIES[study].rows]
    wanted = [ROWS[name] for name in dict.fromkeys(names)]
    _build_shards(out, wanted)
    if options.row:
        job = trial_job(wanted[0].tuned_as, options.trial) if options.trial else Job(wanted[0], options.seed)
        run_job(planner, job)
        return
    for size in STEP_SIZES if "E3" in options.only else ():
        time_step(runs, size)
    methods = [method for method in METHODS if any(row.tuned_as == method for row in wanted)]
    trials = [trial_job(method, lr) for lr in BASE_LRS for method in methods]
    JobPool(planner, out).run(trials, "trials", lambda: None)
    jobs = [Job(row, seed) for seed in range(options.seeds) for row in wanted]
    JobPool(planner, out).run(jobs, "study", lambda: _write_report(out, options.only, planner, options.seeds))
    _write_report(out, options.only, planner, options.seeds)
    print((out / "study.md").read_text())


class JobPool:
    """Runs jobs without records in their order, NUM_PARALLEL at a time, each in a process of its own."""

    def __init__(self, planner: Planner, out: Path) -> None:
        self.planner, self.out = planner, out
        self.lock, self.processes, self.is_stopping = threading.Lock(), set(), threading.Event()

    def run(self, jobs: Sequence[Job], title: str, report: Callable[[], None]) -> None:
        """Run the jobs, and `report` after each.

        Raises:
            StoppedEarly: After SIGINT or SIGTERM.
            UserError: If a job fails. The others are stopped; all can be continued.
        """
        missing = [job for job in jobs if not self.planner.is_done(job)]
        costs = {job: self.planner.cost(job) for job in jobs}
        done = sum(costs[job] for job in jobs if job not in missing)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        handler = signal.signal(signal.SIGTERM, stop)
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, ETA {remaining}"
        try:
            with tqdm(total=sum(costs.values()), initial=done, desc=title, bar_format=layout) as bar:
                self._run_parallel(missing, lambda job: (bar.update(costs[job]), report()), bar.write)
        except KeyboardInterrupt:
            raise StoppedEarly("stopped; run the same command again to continue") from None
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _run_parallel(self, jobs: Sequence[Job], finish: Callable[[Job], object], log: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(NUM_PARALLEL) as pool:
            try:
                futures = [pool.submit(self._run_process, job, finish, log) for job in jobs]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self.is_stopping.set()
                for process in list(self.processes):
                    process.terminate()
                raise

    def _run_process(self, job: Job, finish: Callable[[Job], object], log: Callable[[str], None]) -> None:
        words = [sys.executable, __file__, str(self.out), "--size", str(self.planner.size), "--row", job.row.name]
        words += ["--trial", job.trial] if job.trial else ["--seed", str(job.seed)]
        with self.lock:
            if self.is_stopping.is_set():
                return
            log(f"{time.strftime('%H:%M:%S')} {job}")
            process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            self.processes.add(process)
        _, printed = process.communicate()
        with self.lock:
            self.processes.discard(process)
            if self.is_stopping.is_set():
                return
            if process.returncode:
                raise UserError(
                    f"{printed[-3000:]}\n{job}: ended with exit code {process.returncode}; fix it, and run the same "
                    "command again to continue"
                )
            finish(job)


def _build_shards(out: Path, rows: Sequence[Weights]) -> None:
    """Build the shard sets that the rows need, and a folder of pictures.

    CIFAR-10: train (nine tenths of the training images), valid (the others) and test.
    """
    shards = out / "shards"
    if any(not row.task for row in rows) and not (shards / "pictures").exists():
        cifar = _data_folder("CIFAR10_DIR", "train.tar and test.tar of CIFAR-10")
        with tarfile.open(cifar / "train.tar") as archive:
            members = [member for member in archive if member.isfile()]
            for name, is_held_out in (("valid", True), ("train", False)):
                part = [member for member in members if (int(Path(member.name).stem) % 10 == 9) == is_held_out]
                _copy_members(archive, part, shards / f"{name}.tar")
                _build(shards / f"{name}.tar", shards / name)
                (shards / f"{name}.tar").unlink()
        _build(cifar / "test.tar", shards / "test")
        _extract_pictures(cifar / "test.tar", shards / "pictures")
    if any(row.size == "photos" for row in rows):
        _build(_data_folder("IMAGENET_SAMPLE_DIR", "photographs"), shards / "photos", "--resize", "128")
    for name in {row.task for row in rows if row.task}:
        task = TASKS[name]
        folder = _data_folder(task.variable, "a data set")
        _build(folder / task.photographs, shards / f"{name}-photographs", "--resize", "128")
        for part, split in zip(("train", "val"), task.splits, strict=True):
            if not (shards / f"{name}-{part}" / "manifest.json").exists():
                run_command("data_prep", task.builder, str(folder), str(shards / f"{name}-{part}"), "--split", split)


def _copy_members(archive: tarfile.TarFile, members: Sequence[tarfile.TarInfo], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as output:
        for member in members:
            output.addfile(member, archive.extractfile(member))


def _extract_pictures(test: Path, folder: Path) -> None:
    """Extract the first test images of every class."""
    new = folder.with_name("pictures.new")
    new.mkdir(exist_ok=True)
    with tarfile.open(test) as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda member: Path(member.name).stem)
        for member in members[:NUM_PICTURES]:
            (new / member.name.replace("/", "-")).write_bytes(archive.extractfile(member).read())
    new.rename(folder)


def _build(source: Path, out: Path, *options: str) -> None:
    if not (out / "manifest.json").exists():
        run_command("data_prep", "folder", str(source), str(out), "--shard-size", "2500", *options)


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
            records = {size: step_record(planner.runs, size) for size in STEP_SIZES}
            parts.append(format_speed({size: read_json(path) for size, path in records.items() if path.exists()}))
    atomic_write(out / "study.md", "\n".join([*parts, _format_trials(planner)]))


def _collect(planner: Planner, rows: Sequence[str], num_seeds: int) -> tuple[Results, dict[str, float], dict[str, int]]:
    """Return the results of the rows, and the operations (10^15) and images of their pre-training."""
    results: Results = {}
    compute, images = {}, {}
    for row in map(ROWS.__getitem__, rows):
        units = planner.units(row)
        images[row.name] = round(units * UNIT_STEPS * planner.size) * BATCH
        compute[row.name] = training_flops(planner.flops(row)) * images[row.name] / 1e15 if units else 0.0
        values = {seed: planner.read(Job(row, seed)) for seed in range(num_seeds)}
        results[row.name] = {seed: value for seed, value in values.items() if value}
    return results, compute, images


def _format_trials(planner: Planner) -> str:
    lines = ["### Learning rates", "", f"| method | {' | '.join(BASE_LRS)} |", "| --- " * (1 + len(BASE_LRS)) + "|"]
    for method in METHODS:
        scores = [planner.read(trial_job(method, lr)).get("linprobe") for lr in BASE_LRS]
        lines.append(f"| {method} | {' | '.join('' if score is None else f'{score:.1f}' for score in scores)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    main()
