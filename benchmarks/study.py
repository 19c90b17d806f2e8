"""Run a miniature study on CIFAR-10: four methods and two combinations, equal wall time, several seeds.

    CIFAR10_DIR=... python benchmarks/study.py OUT                   about an hour and a half on two CPU cores
    CIFAR10_DIR=... python benchmarks/study.py OUT --seconds 600 --seeds 5 --methods mae emae

Everything is done by the commands that a user would run: shards, `pretrain`, `knn`, `linprobe`, `finetune`.
Each result in OUT is kept and not computed again, so after an interruption the same command continues. First
the speed of each method is measured alone, to find how many steps fit into the time; nothing else should run
in those minutes. After that a run is a fixed number of steps, whatever else runs on the machine. Without a
GPU, as many runs as cores are started at a time, one per core. Writes OUT/study.json, OUT/study.md and
OUT/study.png.

CIFAR10_DIR contains train.tar and test.tar with <split>/<class>/<number>.jpg. Pre-training uses all 50,000
training images; k-NN and probe use the labels of a fifth of them, fine-tuning those of a hundredth.
Accuracies are top-1 on all 10,000 test images; k-NN and probe use the mean of the patch tokens. Disagreement
and error are in pixel levels of 255, on 64 test images with five masks each; they are comparable only between
methods with the same mask ratio, and losses only between methods with the same loss. The seed is that of
pre-training, of the heads and of fine-tuning; the labeled images are always the same. The table has the mean
over the seeds and half of its 95 % interval (Student's t).
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import matplotlib
import torch
from scipy.stats import t
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMALL = {
    "data.image_size": 32,
    "data.global_batch": 32,
    "engine.micro_batch": 32,
    "engine.precision": "fp32",
    "model.name": "vit_tiny",
    "model.patch_size": 4,
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 3,
    "model.decoder_width": 64,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "method.lomar.window_size": 4,  # of 8 x 8 patches, as 7 is of 14 x 14
    "method.efficient_mae.beta": 6.5,  # 26 px at patch 16, in patches of 4
    "optim.base_lr": 8e-3,
    "optim.warmup_steps": 200,
    "train.log_every": 20,
    "train.checkpoint_every": 10**6,
}
METHODS = {
    "mae": {"method.name": "mae"},
    "emae": {"method.name": "emae"},
    "efficient_mae": {"method.name": "efficient_mae"},
    "lomar": {"method.name": "lomar"},
    "emae + difficulty": {"method.name": "emae", "method.emae.difficulty_flatten": "true"},
    "lomar + difficulty": {"method.name": "lomar", "method.lomar.difficulty_flatten": "true"},
}
SPEED_STEPS = 100  # steps to measure a method's speed; the first fifth is not counted
FEATURES = ("--resize", "32")
EVAL_LABELS, FINETUNE_LABELS = 0.2, 0.01  # shares of the labels: for k-NN and the probe, and for fine-tuning
NUM_PICTURES = 64
ONE_CORE = {} if torch.cuda.is_available() else {"data.decode_threads": 1}
NUM_PARALLEL = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
COLUMNS = {
    "knn": "k-NN, %",
    "probe": "linear probe, %",
    "tuned": f"fine-tuned on {FINETUNE_LABELS:.0%} of labels, %",
    "loss": "loss",
    "disagreement": "disagreement",
    "error": "error",
    "images_per_s": "images/s",
    "steps": "steps",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=300, help="duration of each pre-training (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    if "CIFAR10_DIR" not in os.environ:
        sys.exit("CIFAR10_DIR is not set; set it to the folder with CIFAR-10's train.tar and test.tar")
    out, seeds = options.out, range(options.seeds)
    for split in ("train", "test"):
        archive = Path(os.environ["CIFAR10_DIR"]) / f"{split}.tar"
        _command("data_prep", "folder", archive, out / split, "--shard-size", "2500")
    _extract_pictures(out)
    speeds = {name: _measure_speed(out, name) for name in tqdm(options.methods, "speeds", disable=None)}
    tasks = {("raw pixels", 0): lambda: _evaluate(out, out / "pixels", "pixels:32", tune=False)}
    for seed in seeds:
        tasks["random weights", seed] = partial(_run_random, out, seed)
    for seed in seeds:
        for name in options.methods:
            steps = max(1, round(options.seconds * speeds[name] / SMALL["data.global_batch"]))
            tasks[name, seed] = partial(_run_method, out, name, seed, steps)
    results = _run_all(tasks)
    rows = {name: [results[name, seed] for seed in seeds if (name, seed) in results] for name, _ in tasks}
    for name, speed in speeds.items():
        rows[name] = [result | {"images_per_s": speed} for result in rows[name]]
    (out / "study.json").write_text(json.dumps({"seconds": options.seconds, "rows": rows}, indent=1) + "\n")
    (out / "study.md").write_text(_table(rows))
    _plot(rows, out / "study.png")
    print(_table(rows))


def _run_all(tasks: dict[tuple[str, int], Callable[[], dict]]) -> dict[tuple[str, int], dict]:
    """Run the tasks, NUM_PARALLEL at a time, and return their results."""
    results = {}
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        running = {pool.submit(task): key for key, task in tasks.items()}
        try:
            for future in tqdm(as_completed(running), "study", len(running), unit="run"):
                results[running[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _measure_speed(out: Path, name: str) -> float:
    """Return images per second of a short run."""
    run = out / "speed" / _file_name(name)

    def measure() -> dict:
        _pretrain(out, run, name, 0, SPEED_STEPS)
        return {"images_per_s": statistics.median(line["images_per_s"] for line in _metrics(run)[1:])}

    return _cached(run.with_suffix(".json"), measure)["images_per_s"]


def _run_method(out: Path, name: str, seed: int, steps: int) -> dict:
    run = out / "runs" / f"{_file_name(name)}-{seed}-{steps}"
    folder = run.with_name(run.name + ".evaluated")
    loss = _cached(folder / "loss.json", lambda: _pretrain(out, run, name, seed, steps))["loss"]
    agreement = _cached(folder / "agreement.json", lambda: _agreement(out, run, folder / "agreement.png"))
    run_results = {"loss": loss, **agreement, "steps": steps}
    return {**_evaluate(out, folder, str(run), seed), **run_results}


def _extract_pictures(out: Path) -> None:
    """Extract the first test images of every class."""
    images = out / "pictures"
    if not images.exists():
        new = images.with_name("pictures.new")
        new.mkdir(exist_ok=True)
        with tarfile.open(Path(os.environ["CIFAR10_DIR"]) / "test.tar") as archive:
            members = sorted((m for m in archive if m.isfile()), key=lambda member: Path(member.name).stem)
            for member in members[:NUM_PICTURES]:
                (new / member.name.replace("/", "-")).write_bytes(archive.extractfile(member).read())
        new.rename(images)


def _agreement(out: Path, run: Path, picture: Path) -> dict:
    """Parse disagreement and error from the output of `reconstruct`."""
    options = ("--kind", "agreement", "--count", NUM_PICTURES, "--seeds", 5)
    output = _command("pipeline", "reconstruct", run, "--images", out / "pictures", "--out", picture, *options)
    disagreement, error = re.search(r"disagreement ([\d.]+), error ([\d.]+) levels of 255", output).groups()
    return {"disagreement": float(disagreement), "error": float(error)}


def _evaluate(out: Path, folder: Path, weights: str, seed: int = 0, tune: bool = True) -> dict:
    """Evaluate weights: k-NN (k = 20), a linear probe on center crops, fine-tuning on few labels."""
    sets = ("--data", out / "train", "--val", out / "test")
    pool = () if weights.startswith("pixels") else ("--pool", "mean")
    options = ("--labels", EVAL_LABELS, *FEATURES, *pool, "--cache", folder / "features")

    def knn() -> dict:
        return json.loads(_command("pipeline", "knn", "--weights", weights, *sets, *options, "--k", "20", "--json"))

    def probe() -> dict:
        settings = _overrides({"data.global_batch": 1024, "train.epochs": 60, "seed": seed})
        arguments = ("--weights", weights, *sets, *options, "--run", folder / "probe", *settings)
        return json.loads(_command("pipeline", "linprobe", *arguments, "--center-crops", "--json"))

    def finetune() -> dict:
        settings = {
            "data.image_size": 32,
            "data.subset": FINETUNE_LABELS,
            "data.subset_by_class": "true",
            "evaluation.resize": 32,
            "evaluation.every_epochs": "null",
            "train.epochs": 30,
            "engine.micro_batch": 64,
            "train.checkpoint_every": 10**6,
            "seed": seed,
            **ONE_CORE,
        }
        arguments = ("finetune_tiny", "--weights", weights, *sets, "--run", folder / "tuned")
        _command("pipeline", "finetune", *arguments, *_overrides(settings))
        return json.loads((folder / "tuned" / "results.json").read_text())

    results = {
        "knn": _cached(folder / "knn.json", knn)["knn"][0]["top1"]["accuracy"],
        "probe": _cached(folder / "probe.json", probe)["top1"]["accuracy"],
    }
    if tune:
        results["tuned"] = _cached(folder / "tuned.json", finetune)["top1"]["accuracy"]
    return results


def _run_random(out: Path, seed: int) -> dict:
    return _evaluate(out, out / f"random-{seed}", _random_weights(out, seed), seed)


def _random_weights(out: Path, seed: int) -> str:
    """Write a recipe and return the name of its random weights, the initial weights of the runs of this seed."""
    path = out / f"random-{seed}.yaml"
    recipe = _command(
        sys.executable,
        "-c",
        "import sys; from pipeline.recipe import load_recipe; print(load_recipe('vitb16_mae', sys.argv[1:]).to_yaml())",
        *(f"{key}={value}" for key, value in {**_settings("mae", seed), "train.steps": 1}.items()),
    )
    path.write_text(recipe)
    return f"random:{path}"


def _pretrain(out: Path, run: Path, name: str, seed: int, steps: int) -> dict:
    settings = {**_settings(name, seed), "train.steps": steps}
    _command("pipeline", "pretrain", "vitb16_mae", "--data", out / "train", "--run", run, *_overrides(settings))
    return {"loss": _metrics(run)[-1]["loss"]}


def _settings(name: str, seed: int) -> dict:
    return {**SMALL, **ONE_CORE, **METHODS[name], "seed": seed}


def _overrides(settings: dict) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def _cached(path: Path, compute: Callable[[], dict]) -> dict:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = compute()
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(result))
        new.replace(path)
    return json.loads(path.read_text())


def _command(program: str, *arguments: object) -> str:
    """Run a command and return its stdout."""
    words = [str(word) for word in arguments]
    command = [program, *words] if program == sys.executable else [sys.executable, "-m", program, *words]
    threads = {"OMP_NUM_THREADS": "1"} if ONE_CORE else {}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if result.returncode:
        last = result.stderr[-2000:]
        sys.exit(
            f"{last}\n{shlex.join(command)}\nfailed with exit code {result.returncode}; "
            "fix the problem and run the study again to continue"
        )
    return result.stdout


def _metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def _file_name(name: str) -> str:
    return name.replace(" + ", "-")


def _table(rows: dict[str, list[dict]]) -> str:
    lines = [f"| weights | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for column in COLUMNS:
            values = [seed[column] for seed in seeds if column in seed]
            cells.append(_format_cell(values, column))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _format_cell(values: list[float], column: str) -> str:
    if not values:
        return ""
    if column in ("steps", "images_per_s"):
        return f"{statistics.mean(values):,.0f}"
    if column == "loss":
        return f"{statistics.mean(values):.3f}"
    if column in ("disagreement", "error"):
        return f"{statistics.mean(values):.1f}"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * _confidence_half_width(values):.1f}"


def _confidence_half_width(values: list[float]) -> float:
    """Return half of Student's 95 % interval of the mean over seeds."""
    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _plot(rows: dict[str, list[dict]], path: Path) -> None:
    """Plot a dot per seed and a line at the mean."""
    titles = {"knn": "k-NN", "probe": "linear probe", "tuned": f"fine-tuned, {FINETUNE_LABELS:.0%} of the labels"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 0.5 * len(rows) + 1.4), sharey=True)
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for row, seeds in enumerate(rows.values()):
            values = [100 * seed[key] for seed in seeds if key in seed]
            panel.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
            if values:
                panel.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="black")
        panel.set_title(title)
        panel.set_xlabel("top-1, %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
