"""Detection uses the loop of pre-training: its results depend only on recipe and data, and are COCO's figures."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_data import read_instances, write_coco, write_instances
from forkserver import run as fork
from PIL import Image
from pytest import approx
from runs import Run, environment, launch_processes
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.train import checkpoint, engine

STEPS = 6
RECIPE = {
    "data.image_size": 96,
    "data.global_batch": 4,
    "engine.micro_batch": 2,
    "engine.activation_checkpointing": "true",
    "detector.drop_path": 0.2,
    "detector.width": 16,
    "detector.samples_per_image": 16,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "optim.warmup_steps": 2,
    "optim.base_lr": 3e-3,  # RPN and NMS choose boxes: a larger step can make a rounding error a different choice
}
BY_HEART = {  # no augmentation
    "data.flip": "false",
    "engine.micro_batch": 4,
    "detector.scale": "[1.0,1.0]",
    "train.steps": 400,
}
FIGURES = [f"{kind}_{name}" for kind in ("box", "mask") for name in
           ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]  # fmt: skip


class DetectionRun(Run):
    """A run of `finetune detect_tiny`, from random weights."""

    recipe = RECIPE

    def __init__(self, sets, directory):
        super().__init__(sets[0], directory)
        self.val = sets[1]

    def arguments(self, **settings):
        settings = {**self.recipe, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        paths = ["--data", str(self.shards), "--val", str(self.val), "--run", str(self.directory)]
        return ["-m", "pipeline", "finetune", "detect_tiny", "--weights", "random:demo_emae", *paths, *sets]

    def results(self):
        return json.loads((self.directory / "results.json").read_text())


def build_set(root: Path, split: str) -> Path:
    out = root.with_name(f"{root.name}-{split}")
    built = fork(["-m", "data_prep", "coco", root, out, "--split", split, "--shard-size", "5"])
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A data set with an image that its annotation file does not list, and two unusable instances to train on."""
    root = write_coco(tmp_path_factory.mktemp("coco"), 12)
    for split in ("train2017", "val2017"):
        shutil.copy(next((root / split).iterdir()), root / split / "unlisted.jpg")
    tree = read_instances(root, "train2017")
    usable = next(entry for entry in tree["annotations"] if not entry["iscrowd"])
    last = max(entry["id"] for entry in tree["annotations"])
    empty_box, short = {"bbox": [*usable["bbox"][:2], 0, 9]}, {"segmentation": [[1, 1, 9, 9]]}
    tree["annotations"] += [{**usable, **change, "id": last + n} for n, change in enumerate((empty_box, short), 1)]
    write_instances(root, tree, "train2017")
    return root


@pytest.fixture(scope="module")
def coco_sets(coco) -> tuple[Path, Path]:
    """Two shard sets of 12 listed images, one of each without instances."""
    return build_set(coco, "train"), build_set(coco, "val")


@pytest.fixture(scope="module")
def finished(coco_sets, tmp_path_factory) -> DetectionRun:
    """A run that was killed and resumed."""
    run = DetectionRun(coco_sets, tmp_path_factory.mktemp("runs") / "one")
    run.kill_at(1, "step 6")
    run.before = run.losses()
    run.train(1)
    return run


def test_resume_is_bit_identical_and_ranks_and_stages_agree(finished, coco_sets, tmp_path):
    assert 4 <= len(finished.before) < STEPS, "with steps after the checkpoint of step 3"
    assert finished.losses()[: len(finished.before)] == finished.before
    expected = [loss for _, loss in finished.losses()]
    assert len(expected) == STEPS
    for ranks, stage in ((2, 3), (1, 2)):
        run = DetectionRun(coco_sets, tmp_path / f"zero{stage}")
        run.train(ranks, engine__zero_stage=stage)
        assert [loss for _, loss in run.losses()] == approx(expected, abs=1e-5)
        assert {name: run.results()[name] for name in FIGURES} == approx(
            {name: finished.results()[name] for name in FIGURES}, abs=1e-3
        )


@pytest.fixture(scope="module")
def confident(finished, tmp_path_factory) -> Path:
    """The run directory, with random weights of the classes, so that detections have high scores."""
    run = shutil.copytree(finished.directory, tmp_path_factory.mktemp("runs") / "confident")
    folder = run / "checkpoints" / (run / "checkpoints/latest").read_text()
    weights = load_file(folder / engine.WEIGHTS)
    weights["heads.roi_heads.box_predictor.cls_score.weight"].normal_(generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / engine.WEIGHTS)
    files = checkpoint.fsync_and_hash(folder, checkpoint.list_files(folder))
    checkpoint.write_state(folder, {**checkpoint.read_state(folder), "files": files})
    return run


def test_evaluate_has_pycocotools_figures_of_the_published_annotations(
    confident, coco, coco_sets, tmp_path, capsys, kept_environment
):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    arguments = ["evaluate", str(confident), "--val", str(coco_sets[1]), "--save-predictions", str(tmp_path), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    truth = COCO(coco / "annotations/instances_val2017.json")
    assert any(entry["iscrowd"] for entry in truth.dataset["annotations"])
    assert len(truth.imgToAnns) < len(truth.imgs) == result["val"]["samples"] == 12
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert len(detections) > 50
    assert {row["category_id"] for row in detections} <= {entry["id"] for entry in truth.dataset["categories"]}
    found = truth.loadRes(detections)
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip([name for name in FIGURES if name.startswith(kind)], evaluation.stats[:6], strict=True):
            assert result[name] == (approx(value, abs=1e-6) if value >= 0 else None), name


def test_evaluate_repeats_the_evaluation_of_the_run(finished, capsys, kept_environment):
    assert main(["evaluate", str(finished.directory), "--val", str(finished.val), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: result[name] for name in FIGURES} == {name: finished.results()[name] for name in FIGURES}
    assert isinstance(json.loads((finished.directory / "predictions/detections.json").read_text()), list)
    logged = finished.metrics()[-1]
    assert {name: logged.get(name) for name in FIGURES} == {name: result[name] for name in FIGURES}


def test_predict_draws_detections(confident, coco, tmp_path, kept_environment):
    photographs = sorted((coco / "val2017").glob("*.jpg"))[:2]
    assert main(["predict", str(confident), "--images", *map(str, photographs), "--out", str(tmp_path)]) == 0
    for photograph in photographs:
        with Image.open(photograph) as image, Image.open(tmp_path / f"{photograph.stem}.png") as picture:
            assert picture.size == image.size
            assert (np.asarray(picture) != np.asarray(image.convert("RGB"))).mean() > 0.01


def without_instances(tree):
    tree["annotations"] = [entry for entry in tree["annotations"] if entry["iscrowd"]]


def other_name(tree):
    tree["categories"][0]["name"] = "someone"


def other_size(tree):
    for image in tree["images"]:
        image["width"] += 7


@pytest.mark.parametrize(
    ("change", "option", "named"),
    [(without_instances, "--data", "instance"), (other_name, "--val", "someone"), (other_size, "--data", "px")],
)
def test_unusable_sets_are_errors(coco, coco_sets, tmp_path, change, option, named):
    root = tmp_path / "coco"
    root.mkdir()
    (root / "val2017").symlink_to(coco / "val2017")
    tree = read_instances(coco)
    change(tree)
    write_instances(root, tree)
    changed = build_set(root, "val")
    train, val = (changed, coco_sets[0]) if option == "--data" else (coco_sets[0], changed)
    run = DetectionRun((train, val), tmp_path / "run")
    done = fork(run.arguments(), env=environment())
    errors = [line for line in done.stderr.splitlines() if line.startswith("pipeline: error: ")]
    assert done.returncode == 2 and len(errors) == 1 and named in errors[0] and str(changed) in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_unusable_instances_and_unlisted_images_are_left_out_and_counted(finished):
    output = finished.output.read_text()
    assert "skipped 2 instances: 1 empty box, 1 no polygon of three points" in output
    assert "2 of 13 images are left out" in output
    assert "--val" in output and "1 of 13 images are left out" in output


def test_lomar_is_an_error(coco_sets, tmp_path):
    run = DetectionRun(coco_sets, tmp_path / "run")
    arguments = [word.replace("random:demo_emae", "random:lomar.yaml") for word in run.arguments()]
    shutil.copy(Path(__file__).parents[2] / "pipeline/recipe/presets/demo_emae.yaml", tmp_path / "lomar.yaml")
    text = (tmp_path / "lomar.yaml").read_text().replace("name: emae", "name: lomar", 1)
    (tmp_path / "lomar.yaml").write_text(text)
    arguments = [word.replace("random:lomar.yaml", f"random:{tmp_path / 'lomar.yaml'}") for word in arguments]
    done = fork(arguments, env=environment())
    assert done.returncode == 2 and "LoMaR" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_manifest_maps_classes_to_category_ids(coco, coco_sets):
    manifest = json.loads((coco_sets[1] / "manifest.json").read_text())
    published = sorted(read_instances(coco)["categories"], key=lambda category: category["id"])
    assert manifest["classes"] == [category["name"] for category in published]
    assert manifest["category_ids"] == [category["id"] for category in published]
    assert manifest["annotation"] == "instances" and np.all(np.diff(manifest["category_ids"]) > 0)


@pytest.mark.soak
@pytest.mark.skipif("COCO_DIR" not in os.environ, reason="COCO_DIR is not set")
def test_detect_tiny_learns_sixteen_images_by_heart(tmp_path, capsys):
    root, started = tmp_path / "coco", time.monotonic()
    tree = read_instances(Path(os.environ["COCO_DIR"]), "train2017")
    annotated = {entry["image_id"] for entry in tree["annotations"] if not entry["iscrowd"]}
    tree["images"] = sorted((i for i in tree["images"] if i["id"] in annotated), key=lambda image: image["id"])[:16]
    ids = {image["id"] for image in tree["images"]}
    tree["annotations"] = [entry for entry in tree["annotations"] if entry["image_id"] in ids]
    write_instances(root, tree, "train2017")
    (root / "train2017").mkdir()
    for image in tree["images"]:
        shutil.copy(Path(os.environ["COCO_DIR"]) / "train2017" / image["file_name"], root / "train2017")
    for seed, name in ((0, "train"), (1, "val")):  # the same images in another order
        built = fork(["-m", "data_prep", "coco", root, tmp_path / name, "--split", "train", "--seed", str(seed)])
        assert built.returncode == 0, built.stderr
    run = DetectionRun((tmp_path / "train", tmp_path / "val"), tmp_path / "run")
    run.recipe, run.launch = BY_HEART, launch_processes  # a fork may take ten minutes at most
    run.train(2)
    results, minutes = run.results(), (time.monotonic() - started) / 60
    with capsys.disabled():
        print(f"box AP50 {results['box_ap50']:.3f}, mask AP50 {results['mask_ap50']:.3f}, {minutes:.1f} minutes")
    assert results["box_ap50"] > 0.5 and results["mask_ap50"] > 0.4
