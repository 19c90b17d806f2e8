"""Fine-tuning trains by the loop that pre-training trains by: what it computes depends on recipe and data."""

import json
import shutil
from pathlib import Path

from pytest import approx
from runs import Run
from smuggling import smuggle

from pipeline.__main__ import main

STEPS = 7
RECIPE = {  # everything that is random is on
    "data.image_size": 32,
    "data.global_batch": 16,
    "engine.micro_batch": 4,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "optim.warmup_steps": 2,
    "classifier.drop_path": 0.3,
    "classifier.erasing": 0.5,
    "classifier.rand_augment": 9,
    "evaluation.every_epochs": 1,  # of 60 images: after step 4, and at the end
}


ZERO_3 = Path(__file__).parents[2] / "ds_configs/zero3.json"


class Tuning(Run):
    """A run of `finetune`, from random weights."""

    def __init__(self, sets, directory, *options):
        super().__init__(sets[0], directory)
        self.val, self.options = sets[1], options

    def arguments(self, **settings):
        settings = {**RECIPE, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        places = ["--data", str(self.shards), "--val", str(self.val), "--run", str(self.directory)]
        command = ["finetune", "finetune_tiny", "--weights", "random:demo_emae"]
        return ["-m", "pipeline", *command, *places, *self.options, *sets]

    def accuracy(self):
        return json.loads((self.directory / "accuracy.json").read_text())


def test_killed_and_continued_to_the_bit_and_on_two_ranks_the_same(labelled_sets, tmp_path):
    one = Tuning(labelled_sets, tmp_path / "one")
    two = Tuning(labelled_sets, tmp_path / "two", "--deepspeed_config", str(ZERO_3))
    one.kill_at(1, "step 7")
    before = one.losses()
    assert len(before) < STEPS and (one.directory / "checkpoints/latest").read_text() == "step-00000004"
    one.train(1)  # steps 5 and 6 once more
    assert one.losses()[: len(before)] == before and len(one.losses()) == STEPS
    two.train(2)
    assert [loss for _, loss in two.losses()] == approx([loss for _, loss in one.losses()], abs=1e-5)
    assert two.accuracy() == one.accuracy() and two.accuracy()["top1"]["total"] == 42
    measured = [[line.get("top1") for line in run.metrics()] for run in (one, two)]
    assert measured[0] == measured[1] and sum(share is not None for share in measured[0]) == 2
    assert main(["export", str(two.directory), str(tmp_path / "timm"), "--format", "timm"]) == 0


def test_a_bad_validation_image_costs_no_training(labelled_sets, tmp_path):
    train, whole = labelled_sets
    tuning = Tuning((train, shutil.copytree(whole, tmp_path / "val")), tmp_path / "run")
    (key,) = smuggle(tuning.val, 1)
    settings = {"train__steps": 2, "evaluation__every_epochs": "null"}
    assert tuning.start(1, **settings).wait() == 2
    said, before = tuning.output.read_text(), tuning.losses()
    assert repr(key) in said and "Everything is saved at step 2" in said and "Traceback" not in said
    assert len(before) == 2 and (tuning.directory / "checkpoints/latest").read_text() == "step-00000002"
    shutil.copytree(whole, tuning.val, dirs_exist_ok=True)
    tuning.train(1, **settings)
    assert tuning.losses() == before and tuning.accuracy()["top1"]["total"] == 42
