"""Segmentation in the shared trainer: resume, ranks, evaluation, predictions and bad input."""

import json
import os
import shutil
import time
from pathlib import Path

import forkserver
import numpy as np
import pytest
from PIL import Image
from pytest import approx
from runs import Run, environment, launch_processes

from pipeline.data.reader import ShardReader

STEPS = 6
RECIPE = {  # with everything that is random
    "data.image_size": 32,
    "data.global_batch": 4,
    "engine.micro_batch": 4,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "optim.warmup_steps": 2,
    "segmenter.channels": 16,
    "segmenter.auxiliary_channels": 16,
    "segmenter.drop_path": 0.3,
}
BY_HEART = {  # no augmentation
    "data.global_batch": 12,
    "data.flip": "false",
    "engine.micro_batch": 6,
    "train.steps": 300,
    "segmenter.scale": "[1.0,1.0]",
    "segmenter.cat_max_ratio": 1.1,
    "segmenter.photometric": "false",
    "segmenter.dropout": 0.0,
}
ZERO_3 = Path(__file__).parents[2] / "ds_configs/zero3.json"


class SegmentationRun(Run):
    """A run of `finetune segment_tiny`, from random weights."""

    recipe = RECIPE

    def __init__(self, sets, directory, *options):
        super().__init__(sets[0], directory)
        self.val, self.options = sets[1], options

    def arguments(self, **settings):
        settings = {**self.recipe, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        paths = ["--data", str(self.shards), "--val", str(self.val), "--run", str(self.directory)]
        command = ["finetune", "segment_tiny", "--weights", "random:demo_emae"]
        return ["-m", "pipeline", *command, *paths, *self.options, *sets]

    def results(self):
        return json.loads((self.directory / "results.json").read_text())

    def evaluate(self, ranks, *options):
        """Return what `evaluate --json` prints on several ranks."""
        arguments = ["-m", "pipeline", "evaluate", str(self.directory), "--val", str(self.val), "--json", *options]
        output = self.directory.with_suffix(".json")
        with open(output, "w") as stdout, open(self.output, "a") as stderr:
            process = self.launch(ranks, arguments, env=environment(), stdout=stdout, stderr=stderr)
            assert process.wait() == 0, self.output.read_text()[-4000:]
        return json.loads(output.read_text())


def scores_of(folder: Path, val: Path, num_classes: int) -> dict:
    """Compute mIoU and pixel accuracy from predicted PNG files, in plain numpy."""
    reader = ShardReader(val)
    intersection, union, right, total = np.zeros(num_classes), np.zeros(num_classes), 0, 0
    for shard, size in enumerate(reader.shard_sizes.tolist()):
        for index in range(size):
            path = folder.parent / "label.png"
            path.write_bytes(reader.read_many(shard, [index], "png")[0].tobytes())
            labels = np.asarray(Image.open(path))
            predicted = np.asarray(Image.open(folder / f"{reader.key(shard, index)}.png"))
            assert predicted.shape == labels.shape and predicted.min() >= 1
            for number in range(1, num_classes + 1):
                here, there = (labels == number), (predicted == number) & (labels > 0)
                intersection[number - 1] += (here & there).sum()
                union[number - 1] += (here | there).sum()
            right, total = right + (predicted == labels)[labels > 0].sum(), total + (labels > 0).sum()
    return {"miou": (intersection / union)[union > 0].mean(), "aacc": right / total}


def test_resume_is_bit_identical_and_two_ranks_agree(label_map_sets, tmp_path):
    one = SegmentationRun(label_map_sets, tmp_path / "one")
    one.kill_at(1, "step 6")
    before = one.losses()
    assert (one.directory / "checkpoints/latest").read_text() == "step-00000003" and len(before) > 3
    one.train(1)
    assert len(one.losses()) == STEPS and one.losses()[: len(before)] == before
    two = SegmentationRun(label_map_sets, tmp_path / "two", "--deepspeed_config", str(ZERO_3))
    two.train(2, engine__micro_batch=2)
    assert [loss for _, loss in two.losses()] == approx([loss for _, loss in one.losses()], abs=1e-5)
    assert two.results()["miou"] == approx(one.results()["miou"], abs=5e-3), "also with running statistics"
    last = one.metrics()[-1]
    assert {"miou", "macc", "aacc", "iou", "head_loss", "auxiliary_loss"} <= last.keys()

    trained = one.results()
    assert set(trained["iou"]) <= {"red", "green", "blue", "yellow"} and trained["iou"] == last["iou"]
    evaluated = one.evaluate(2, "--save-predictions", str(tmp_path / "png"))
    scores = {name: evaluated[name] for name in ("miou", "macc", "aacc", "iou")}
    assert scores == {name: trained[name] for name in scores}, "on two ranks as on one"
    computed = scores_of(tmp_path / "png", label_map_sets[1], 4)
    assert {name: scores[name] for name in computed} == approx(computed, abs=1e-9)


@pytest.mark.parametrize("case", ["classes", "no label maps", "one image"])
def test_bad_input_is_a_one_line_error(case, label_map_sets, labelled_sets, tmp_path):
    train, val = label_map_sets
    settings, named = {}, "--val"
    if case == "classes":
        manifest = json.loads((val / "manifest.json").read_text())
        manifest["classes"][1] = "purple"
        val = tmp_path / "val"
        val.mkdir()
        for path in label_map_sets[1].iterdir():
            (val / path.name).symlink_to(path)
        (val / "manifest.json").unlink()
        (val / "manifest.json").write_text(json.dumps(manifest))
    elif case == "no label maps":
        train, named = labelled_sets[0], "--data"
    else:
        settings, named = {"engine__micro_batch": 1, "data__global_batch": 1}, "engine.micro_batch"
    run = SegmentationRun((train, val), tmp_path / "run")
    assert run.start(1, **settings).wait() == 2
    lines = [line for line in run.output.read_text().splitlines() if "error" in line]
    assert len(lines) == 1 and named in lines[0] and "Traceback" not in run.output.read_text(), run.output.read_text()


@pytest.mark.soak
@pytest.mark.skipif("ADE_DIR" not in os.environ, reason="ADE_DIR is not set")
def test_segment_tiny_learns_twelve_images_by_heart(tmp_path, capsys):
    source, started = Path(os.environ["ADE_DIR"]), time.monotonic()
    for image in sorted((source / "images/training").iterdir())[:12]:
        for file in (image, source / f"annotations/training/{image.stem}.png"):
            target = tmp_path / "src" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for seed, name in ((0, "train"), (1, "val")):  # the same images in another order
        options = ["--classes", source / "classes.txt", "--seed", seed]
        assert (
            forkserver.run(["-m", "data_prep", "ade20k", tmp_path / "src", tmp_path / name, *options]).returncode == 0
        )
    run = SegmentationRun((tmp_path / "train", tmp_path / "val"), tmp_path / "run")
    run.recipe, run.launch = BY_HEART, launch_processes  # a fork may take ten minutes at most
    run.train(2)
    minutes = (time.monotonic() - started) / 60
    with capsys.disabled():
        print(f"mIoU {run.results()['miou']:.3f} after {minutes:.1f} minutes")
    assert run.results()["miou"] > 0.6, "over the classes present: others count as 0 if predicted"
