"""Check that two checkouts compute the same: record reference runs with each, and compare the records.

    python tests/reference_runs.py record CHECKOUT RECORD.json
    python tests/reference_runs.py compare RECORD.json RECORD.json
    python tests/reference_runs.py resume OLD_CHECKOUT NEW_CHECKOUT

`record` runs the commands of a checkout in small fp32 runs on the CPU: every pre-training method and
combination on one rank or two, one fine-tuning, one linear probe, k-NN, and a build of every kind of data source.
It records all metrics (repr), sample traces, checksums of the weights and of every file of the
shard sets. `resume` starts runs with the old checkout, kills them after their first checkpoint, continues them with
the new one, and compares the losses with uninterrupted runs of the old one. A difference ends with exit code 1.

The processes import `pipeline` and `data_prep` from the checkout that they run in, and everything else from
this Python environment. Use it before and after a change that must not change behavior.
"""

import argparse
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "data_prep"))
from oddities import oddities
from published import WNIDS, WORDS, coco_annotations, csv_of, devkit, tar_of, write_tree, zip_of

SMALL = {
    "model.name": "vit_tiny",
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 4,
    "model.decoder_width": 32,
    "model.decoder_depth": 1,
    "model.decoder_heads": 4,
    "method.lomar.window_size": 3,
    "data.image_size": 32,
    "data.global_batch": 16,
    "data.trace": "true",
    "engine.micro_batch": 4,
    "engine.precision": "fp32",
    "train.steps": 10,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "optim.warmup_steps": 4,
}
FLATTEN = "difficulty_flatten"
PRETRAINING = {  # name: recipe, ranks, settings
    "mae": ("vitb16_mae", 1, {}),
    "emae": ("demo_emae", 2, {}),
    "efficient_mae": ("vitb16_efficient_mae", 1, {"method.efficient_mae.beta": "null"}),
    "lomar": ("vitb16_lomar", 2, {}),
    "emae_flatten": ("vitb16_emae", 1, {f"method.emae.{FLATTEN}": "true", "method.efficient_mae.beta": "null"}),
    "lomar_flatten": ("vitb16_lomar", 2, {f"method.lomar.{FLATTEN}": "true"}),
    "emae_zero3_ema": ("demo_emae", 2, {"engine.zero_stage": 3, "train.ema_decay": 0.9}),
    "mae_two_crops": ("vitb16_mae", 2, {"data.crops_per_image": 2, "engine.zero_stage": 2}),
}
FINETUNING = {
    "data.image_size": 32,
    "data.global_batch": 16,
    "data.trace": "true",
    "engine.micro_batch": 4,
    "train.steps": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "optim.warmup_steps": 2,
    "classifier.drop_path": 0.3,
    "classifier.erasing": 0.5,
    "classifier.rand_augment": 9,
    "evaluation.every_epochs": 1,
}
PROBE = {
    "data.holdout": 0.2,
    "data.global_batch": 16,
    "engine.micro_batch": 8,
    "train.steps": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
}
NOT_COMPARED = ("time", "images_per_s", "data_wait", "memory", "mfu", "rank_time", "slowest")
"""Start of the names of metrics that measure speed."""


INTERVALS = ("low", "high")
"""End of the names of confidence intervals, which follow from the counts and may differ in the last bit."""
RENAMED = {"skips": "skipped_steps", "replaced": "undecodable"}
"""Metrics columns of earlier versions."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record", help="run the reference runs of a checkout")
    command.add_argument("checkout", type=Path)
    command.add_argument("record", type=Path)
    command.set_defaults(run=lambda args: record(args.checkout.resolve(), args.record))
    command = commands.add_parser("compare", help="compare two records")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.set_defaults(run=lambda args: compare(args.first, args.second))
    command = commands.add_parser("resume", help="continue runs of an old checkout with a new one")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.set_defaults(run=lambda args: resume(args.old.resolve(), args.new.resolve()))
    args = parser.parse_args()
    return args.run(args)


def record(checkout: Path, path: Path) -> int:
    """Run everything in a temporary directory, so that no path of the record names the checkout."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="reference") as temporary:
        place = Path(temporary)
        shards, train, val = _shard_sets(checkout, place, found)
        for name, (recipe, ranks, settings) in PRETRAINING.items():
            run = place / name
            _run(checkout, ranks, _pretrain(recipe, shards, run, settings))
            found[name] = _describe_run(run)
            print(f"{name}: loss {found[name]['metrics'][-1]['loss']}", flush=True)
        weights = place / "emae"
        _run(checkout, 2, _finetune(weights, train, val, place / "finetune"))
        found["finetune"] = _describe_run(place / "finetune")
        _run(checkout, 2, _linprobe(weights, train, val, place / "probe"))
        found["probe"] = _describe_run(place / "probe")
        knn = ["knn", "--weights", str(weights), "--data", str(train), "--val", str(val), "--json"]
        found["knn"] = [row["top1"]["correct"] for row in json.loads(_run(checkout, 1, knn))["knn"]]
    path.write_text(json.dumps(found, indent=1))
    print(f"{path}: {len(found)} results of {checkout}")
    return 0


def compare(first: Path, second: Path) -> int:
    one, two = (_comparable(json.loads(path.read_text())) for path in (first, second))
    differences = list(_differences("", one, two))
    for line in differences[:40]:
        print(line)
    print(f"{len(one)} results: {f'{len(differences)} differences' if differences else 'all equal'}")
    return 1 if differences else 0


def resume(old: Path, new: Path) -> int:
    """Kill runs of the old checkout and continue them with the new one."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="reference") as temporary:
        place = Path(temporary)
        shards, train, val = _shard_sets(old, place, {})
        weights = place / "weights"
        _run(old, 1, _pretrain("demo_emae", shards, weights, {}))
        cases = {
            "pretraining": lambda run: _pretrain("demo_emae", shards, run, {"train.steps": 200}),
            "fine-tuning": lambda run: _finetune(weights, train, val, run, {"train.steps": 200}),
            "linear probe": lambda run: _linprobe(weights, train, val, run, {"train.steps": 4000}),
        }
        for name, arguments in cases.items():
            whole, killed = place / f"{name}-whole", place / f"{name}-killed"
            _run(old, 2, arguments(whole))
            processes = _start(old, 2, arguments(killed))
            while not (killed / "checkpoints/latest").exists():
                assert all(process.poll() is None for process in processes), _output(processes)
                time.sleep(0.01)
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            step = (killed / "checkpoints/latest").read_text()
            _run(new, 2, arguments(killed))
            pairs = [_losses(whole), _losses(killed)]
            equal = pairs[0] == pairs[1]
            failed |= not equal
            print(
                f"{name}: killed after {step}, continued to {len(pairs[1])} steps, {'equal' if equal else 'DIFFERENT'}"
            )
    return failed


def _shard_sets(checkout: Path, place: Path, found: dict) -> tuple[Path, Path, Path]:
    """Build shard sets of every kind of source. Returns one to pre-train on and two labelled ones."""
    images = _photographs()
    for name, (kind, files, options) in _sources(images).items():
        source = write_tree(place / "sources" / name, files)
        out = place / "sets" / name
        _data_prep(checkout, kind, source, out, *options)
        _data_prep(checkout, "verify", out)
        found[f"shards of {name}"] = {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
    print(f"{len(found)} shard sets", flush=True)
    for part in ("train", "val"):
        crops = {}
        for label in range(6):
            square = Image.open(io.BytesIO(images[8 * label])).convert("RGB").resize((96, 96))
            for number in range(12 if part == "train" else 7):
                left, top = 4 * (number % 5), 7 * (number % 4) + (part == "val")
                buffer = io.BytesIO()
                square.crop((left, top, left + 64, top + 64)).save(buffer, "JPEG", quality=90)
                crops[f"class{label}/{label}_{number}.jpg"] = buffer.getvalue()
        _data_prep(checkout, "folder", write_tree(place / part, crops), place / f"{part}-set", "--shard-size", "25")
    return place / "sets" / "folder", place / "train-set", place / "val-set"


def _sources(photographs: list[bytes]) -> dict[str, tuple[str, dict, list[str]]]:
    """name: kind, files of the source, options."""
    small = ["--shard-size", "5"]
    by_class = {
        wnid: {f"{wnid}_{number}.JPEG": photographs[10 * i + number] for number in range(4)}
        for i, wnid in enumerate(WNIDS)
    }
    tars = {f"{wnid}.tar": tar_of(files) for wnid, files in by_class.items()}
    folders = {f"{wnid}/{name}": data for wnid, files in by_class.items() for name, data in files.items()}
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": photographs[i] for i in range(1, 7)}
    solution = [(name[:-5], f"{WNIDS[i % 3]} 10 20 30 40 ") for i, name in enumerate(val)]
    kaggle = "ILSVRC/Data/CLS-LOC"
    names = [f"{number:012d}.jpg" for number in (139, 285, 632, 724)]
    coco = {f"val2017/{name}": photographs[n] for n, name in enumerate(names)}
    ids = ("000a1249af2bc5f0", "0001eeaf4aed83f9", "00075905539074f2")
    columns = "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize"
    columns += ",OriginalMD5,Thumbnail300KURL,Rotation"
    rows = [(i, "train", f"https://f/{i}.jpg", "", "BY", "", "Ann", "x", 1, "", "", turn)
            for i, turn in zip(ids, ("", "90.0", "0.0"), strict=True)]  # fmt: skip
    boxes = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"
    open_images = {
        "train-images-boxable-with-rotation.csv": csv_of(columns, rows),
        "oidv7-class-descriptions.csv": csv_of("LabelName,DisplayName", [("/m/01", "Cat")]),
        "oidv6-train-annotations-bbox.csv": csv_of(
            boxes, [(ids[1], "xclick", "/m/01", 1, 0.1, 0.4, 0.2, 0.5, 1, 0, 0)]
        ),
    }
    odd = {f"odd/{name}.jpg": data for name, (data, _) in oddities(photographs[0]).items()}
    plain = {f"{('ant', 'bee', 'cat')[i % 3]}/{i:03d}.jpg": data for i, data in enumerate(photographs)}
    return {
        "folder": ("folder", plain, ["--shard-size", "16"]),
        "oddities": ("folder", {**odd, **{f"sound/{i}.jpg": photographs[i] for i in range(4)}}, small),
        "imagenet train": ("imagenet", {"ILSVRC2012_img_train.tar": tar_of(tars)}, small),
        "imagenet val": (
            "imagenet",
            {"ILSVRC2012_img_val.tar": tar_of(val), "ILSVRC2012_devkit_t12.tar.gz": devkit([1, 2, 3, 3, 2, 1])},
            ["--split", "val", *small],
        ),
        "imagenet folders": ("imagenet", {f"val/{name}": data for name, data in folders.items()}, ["--split", "val"]),
        "imagenet kaggle": (
            "imagenet",
            {
                **{f"{kaggle}/val/{name}": data for name, data in val.items()},
                "LOC_val_solution.csv": csv_of("ImageId,PredictionString", solution),
                "LOC_synset_mapping.txt": "".join(f"{w} {t}\n" for w, t in zip(WNIDS, WORDS, strict=True)),
            },
            ["--split", "val"],
        ),
        "imagenet21k": ("imagenet21k", tars, small),
        "openimages": (
            "openimages",
            {"train_0.tar": tar_of({f"train/{i}.jpg": photographs[n] for n, i in enumerate(ids)}), **open_images},
            ["--shard-size", "2"],
        ),
        "coco": (
            "coco",
            {
                "val2017.zip": zip_of(coco),
                "annotations_trainval2017.zip": zip_of(coco_annotations(names), zipfile.ZIP_DEFLATED),
            },
            ["--split", "val", "--shard-size", "3"],
        ),
    }  # fmt: skip


def _photographs() -> list[bytes]:
    """60 crops of the photographs that ship with scikit-learn."""
    from sklearn.datasets import load_sample_images

    found = []
    for image in load_sample_images().images:
        for top in range(0, 400, 80):
            for left in range(0, 600, 100):
                buffer = io.BytesIO()
                Image.fromarray(image[top : top + 190, left : left + 160]).save(buffer, "JPEG", quality=90)
                found.append(buffer.getvalue())
    return found


def _pretrain(recipe: str, shards: Path, run: Path, settings: dict) -> list[str]:
    return ["pretrain", recipe, "--data", str(shards), "--run", str(run), *_sets(SMALL | settings)]


def _finetune(weights: Path, train: Path, val: Path, run: Path, settings: dict | None = None) -> list[str]:
    places = ["--weights", str(weights), "--data", str(train), "--val", str(val), "--run", str(run)]
    return ["finetune", "finetune_tiny", *places, *_sets(FINETUNING | (settings or {}))]


def _linprobe(weights: Path, train: Path, val: Path, run: Path, settings: dict | None = None) -> list[str]:
    places = ["--weights", str(weights), "--data", str(train), "--val", str(val), "--run", str(run)]
    return ["linprobe", *places, "--precision", "fp32", *_sets(PROBE | (settings or {}))]


def _sets(settings: dict) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def _data_prep(checkout: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"


def _run(checkout: Path, ranks: int, arguments: list[str]) -> str:
    """Run a command of `pipeline` to its end. Returns what rank 0 printed on stdout."""
    processes = _start(checkout, ranks, arguments)
    outputs = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), f"{arguments}\n{outputs}"
    return outputs[0][0]


def _start(checkout: Path, ranks: int, arguments: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=checkout,
            env={**_environment(), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def _output(processes: list[subprocess.Popen]) -> str:
    return "\n".join(part for process in processes for part in process.communicate())


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _describe_run(run: Path) -> dict:
    """Metrics, sample traces and checksums of the weights of a finished run."""
    traces = sorted((run / "samples").glob("*.txt")) if (run / "samples").exists() else []
    last = run / "checkpoints" / (run / "checkpoints/latest").read_text()
    weights = [*sorted(last.glob("weights*.safetensors")), *sorted(last.glob("heads*.safetensors"))]
    results = [path for name in ("results.json", "accuracy.json") if (path := run / name).exists()]
    return {
        "metrics": [{name: repr(value) for name, value in line.items()} for line in _lines(run)],
        "traces": {path.name: path.read_text().splitlines() for path in traces},
        "weights": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
        "accuracy": json.loads(results[0].read_text())["top1"]["correct"] if results else None,
    }


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _comparable(record: dict) -> dict:
    """Remove the metrics that measure speed, and rename those of earlier versions."""
    for result in record.values():
        if isinstance(result, dict) and "metrics" in result:
            result["metrics"] = [
                {
                    RENAMED.get(name, name): value
                    for name, value in line.items()
                    if not name.startswith(NOT_COMPARED) and not name.endswith(INTERVALS)
                }
                for line in result["metrics"]
            ]
    return record


def _losses(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], repr(line["loss"])) for line in _lines(run)]


def _differences(where: str, one: object, two: object):
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            yield from _differences(f"{where}/{key}", one.get(key), two.get(key))
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from _differences(f"{where}[{number}]", *pair)
    elif one != two:
        yield f"{where}: {str(one)[:100]} != {str(two)[:100]}"


if __name__ == "__main__":
    sys.exit(main())
