"""A miniature study on CIFAR-10: four methods and two combinations, equal wall time, several seeds.

    CIFAR10_DIR=... python benchmarks/study.py OUT                   about an hour and a half on two CPU cores
    CIFAR10_DIR=... python benchmarks/study.py OUT --seconds 600 --seeds 5 --methods mae emae

Everything is done by the commands that a user would give: shards, `pretrain`, `knn`, `linprobe`, `finetune`.
Each result lies in OUT when it is there, and is not computed again: stopped anywhere, the same command goes
on. How many steps fit into the time is measured first, for each method alone, on the machine as it is then:
nothing else should run in those minutes. From then on a run is so many steps, whatever runs beside it; where
there is no GPU, as many at a time as cores, each on one. It writes OUT/study.json, OUT/study.md and
OUT/study.png.

CIFAR10_DIR holds train.tar and test.tar with <split>/<class>/<number>.jpg. Pre-training sees all 50,000
training images; k-NN and probe learn from the labels of a fifth, fine-tuning from those of a hundredth.
Accuracies are top-1 on all 10,000 test images; k-NN and probe are of the mean of the patch tokens.
Disagreement and error are of pixels, in levels of 255, on 64 test images behind five masks each; they compare
only methods that hide as much, and losses only methods that have the same. A seed is that of pre-training, of
the heads and of fine-tuning; the labelled images are always the same. Of several seeds the mean, and half of
its 95 % interval over seeds (Student's t).
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
TRIAL = 100  # steps by which a method's speed is measured; the first fifth is not counted
FEATURES = ("--resize", "32")
SOME, FEW = 0.2, 0.01  # shares of the labels: for k-NN and the probe, and in fine-tuning
PICTURES = 64
ON_ONE_CORE = {} if torch.cuda.is_available() else {"data.decode_threads": 1}
AT_A_TIME = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
FIGURES = {
    "knn": "k-NN, %",
    "probe": "linear probe, %",
    "tuned": f"fine-tuned on {FEW:.0%} of labels, %",
    "loss": "loss",
    "disagreement": "disagreement",
    "error": "error",
    "images_per_s": "images/s",
    "steps": "steps",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=300, help="of pre-training, each (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    if "CIFAR10_DIR" not in os.environ:
        sys.exit("CIFAR10_DIR is not set: name the folder that holds CIFAR-10's train.tar and test.tar")
    out, seeds = options.out, range(options.seeds)
    for split in ("train", "test"):
        archive = Path(os.environ["CIFAR10_DIR"]) / f"{split}.tar"
        _command("data_prep", "folder", archive, out / split, "--shard-size", "2500")
    _pictures(out)
    speeds = {name: _speed(out, name) for name in tqdm(options.methods, "speeds", disable=None)}
    tasks = {("raw pixels", 0): lambda: _judged(out, out / "pixels", "pixels:32", tuned=False)}
    for seed in seeds:
        tasks["random weights", seed] = partial(_untrained, out, seed)
    for seed in seeds:
        for name in options.methods:
            steps = max(1, round(options.seconds * speeds[name] / SMALL["data.global_batch"]))
            tasks[name, seed] = partial(_trained, out, name, seed, steps)
    done = _all(tasks)
    rows = {name: [done[name, seed] for seed in seeds if (name, seed) in done] for name, _ in tasks}
    for name, speed in speeds.items():
        rows[name] = [figures | {"images_per_s": speed} for figures in rows[name]]
    (out / "study.json").write_text(json.dumps({"seconds": options.seconds, "rows": rows}, indent=1) + "\n")
    (out / "study.md").write_text(_table(rows))
    _plot(rows, out / "study.png")
    print(_table(rows))


def _all(tasks: dict[tuple[str, int], Callable[[], dict]]) -> dict[tuple[str, int], dict]:
    """The tasks' results, of so many at a time as fit."""
    done = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = {pool.submit(task): key for key, task in tasks.items()}
        try:
            for future in tqdm(as_completed(running), "study", len(running), unit="run"):
                done[running[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def _speed(out: Path, name: str) -> float:
    """Images per second, by a short run of the same kind."""
    run = out / "speed" / _file_name(name)

    def measure() -> dict:
        _pretrain(out, run, name, 0, TRIAL)
        return {"images_per_s": statistics.median(line["images_per_s"] for line in _metrics(run)[1:])}

    return _once(run.with_suffix(".json"), measure)["images_per_s"]


def _trained(out: Path, name: str, seed: int, steps: int) -> dict:
    run = out / "runs" / f"{_file_name(name)}-{seed}-{steps}"
    place = run.with_name(run.name + ".judged")
    loss = _once(place / "loss.json", lambda: _pretrain(out, run, name, seed, steps))["loss"]
    agreement = _once(place / "agreement.json", lambda: _agreement(out, run, place / "agreement.png"))
    of_run = {"loss": loss, **agreement, "steps": steps}
    return {**_judged(out, place, str(run), seed), **of_run}


def _pictures(out: Path) -> None:
    """The first test images of every class."""
    images = out / "pictures"
    if not images.exists():
        new = images.with_name("pictures.new")
        new.mkdir(exist_ok=True)
        with tarfile.open(Path(os.environ["CIFAR10_DIR"]) / "test.tar") as archive:
            members = sorted((m for m in archive if m.isfile()), key=lambda member: Path(member.name).stem)
            for member in members[:PICTURES]:
                (new / member.name.replace("/", "-")).write_bytes(archive.extractfile(member).read())
        new.rename(images)


def _agreement(out: Path, run: Path, picture: Path) -> dict:
    """By what `reconstruct` says."""
    options = ("--kind", "agreement", "--count", PICTURES, "--seeds", 5)
    said = _command("pipeline", "reconstruct", run, "--images", out / "pictures", "--out", picture, *options)
    disagreement, error = re.search(r"disagreement ([\d.]+), error ([\d.]+) levels of 255", said).groups()
    return {"disagreement": float(disagreement), "error": float(error)}


def _judged(out: Path, place: Path, weights: str, seed: int = 0, tuned: bool = True) -> dict:
    """What some weights are worth: k-NN (k = 20), the probe on centre crops, fine-tuning on few labels."""
    sets = ("--data", out / "train", "--val", out / "test")
    pool = () if weights.startswith("pixels") else ("--pool", "mean")
    some = ("--labels", SOME, *FEATURES, *pool, "--cache", place / "features")

    def knn() -> dict:
        return json.loads(
            _command("pipeline", "knn", "--weights", weights, *sets, *some, "--k", "20", "--json")
        )

    def probe() -> dict:
        settings = _sets({"data.global_batch": 1024, "train.epochs": 60, "seed": seed})
        arguments = ("--weights", weights, *sets, *some, "--run", place / "probe", *settings)
        return json.loads(_command("pipeline", "linprobe", *arguments, "--center-crops", "--json"))

    def finetune() -> dict:
        settings = {
            "data.image_size": 32,
            "data.subset": FEW,
            "data.subset_by_class": "true",
            "evaluation.resize": 32,
            "evaluation.every_epochs": "null",
            "train.epochs": 30,
            "engine.micro_batch": 64,
            "train.checkpoint_every": 10**6,
            "seed": seed,
            **ON_ONE_CORE,
        }
        arguments = ("finetune_tiny", "--weights", weights, *sets, "--run", place / "tuned")
        _command("pipeline", "finetune", *arguments, *_sets(settings))
        return json.loads((place / "tuned" / "accuracy.json").read_text())

    figures = {
        "knn": _once(place / "knn.json", knn)["knn"][0]["top1"]["accuracy"],
        "probe": _once(place / "probe.json", probe)["top1"]["accuracy"],
    }
    if tuned:
        figures["tuned"] = _once(place / "tuned.json", finetune)["top1"]["accuracy"]
    return figures


def _untrained(out: Path, seed: int) -> dict:
    return _judged(out, out / f"random-{seed}", _random(out, seed), seed)


def _random(out: Path, seed: int) -> str:
    """The weights that runs of a seed begin with, as a recipe."""
    path = out / f"random-{seed}.yaml"
    recipe = _command(
        sys.executable,
        "-c",
        "import sys; from pipeline.recipe import load_recipe; "
        "print(load_recipe('vitb16_mae', sys.argv[1:]).to_yaml())",
        *(f"{key}={value}" for key, value in {**_settings("mae", seed), "train.steps": 1}.items()),
    )
    path.write_text(recipe)
    return f"random:{path}"


def _pretrain(out: Path, run: Path, name: str, seed: int, steps: int) -> dict:
    settings = {**_settings(name, seed), "train.steps": steps}
    _command("pipeline", "pretrain", "vitb16_mae", "--data", out / "train", "--run", run, *_sets(settings))
    return {"loss": _metrics(run)[-1]["loss"]}


def _settings(name: str, seed: int) -> dict:
    return {**SMALL, **ON_ONE_CORE, **METHODS[name], "seed": seed}


def _sets(settings: dict) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def _once(path: Path, compute: Callable[[], dict]) -> dict:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = compute()
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(result))
        new.replace(path)
    return json.loads(path.read_text())


def _command(program: str, *arguments: object) -> str:
    """What a command prints."""
    words = [str(word) for word in arguments]
    command = [program, *words] if program == sys.executable else [sys.executable, "-m", program, *words]
    threads = {"OMP_NUM_THREADS": "1"} if ON_ONE_CORE else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        last = done.stderr[-2000:]
        sys.exit(
            f"{last}\n{shlex.join(command)}\nended with exit code {done.returncode}; start the study again"
        )
    return done.stdout


def _metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def _file_name(name: str) -> str:
    return name.replace(" + ", "-")


def _table(rows: dict[str, list[dict]]) -> str:
    lines = [f"| weights | {' | '.join(FIGURES.values())} |", "| --- " * (len(FIGURES) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for figure in FIGURES:
            values = [seed[figure] for seed in seeds if figure in seed]
            cells.append(_cell(values, figure))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], figure: str) -> str:
    if not values:
        return ""
    if figure in ("steps", "images_per_s"):
        return f"{statistics.mean(values):,.0f}"
    if figure == "loss":
        return f"{statistics.mean(values):.3f}"
    if figure in ("disagreement", "error"):
        return f"{statistics.mean(values):.1f}"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * _half_interval(values):.1f}"


def _half_interval(values: list[float]) -> float:
    """Half of Student's 95 % interval of the mean over seeds."""
    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _plot(rows: dict[str, list[dict]], path: Path) -> None:
    """A dot a seed, a line at the mean."""
    titles = {"knn": "k-NN", "probe": "linear probe", "tuned": f"fine-tuned, {FEW:.0%} of the labels"}
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
