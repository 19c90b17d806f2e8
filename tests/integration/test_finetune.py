"""Fine-tuning uses the loop of pre-training: its results depend only on the recipe and the data."""

import json
import shutil
from pathlib import Path

from corrupt_samples import make_undecodable
from pytest import approx
from runs import Run

from pipeline.__main__ import main

STEPS = 7
RECIPE = {  # with everything that is random
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
    "evaluation.every_epochs": 1,  # with 60 images: after step 4, and at the end
}
ZERO_3 = Path(__file__).parents[2] / "ds_configs/zero3.json"


class FinetuneRun(Run):
    """A run of `finetune`, from random weights."""

    def __init__(self, sets, directory, *options):
        super().__init__(sets[0], directory)
        self.val, self.options = sets[1], options

    def arguments(self, **settings):
        settings = {**RECIPE, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        paths = ["--data", str(self.shards), "--val", str(self.val), "--run", str(self.directory)]
        command = ["finetune", "finetune_tiny", "--weights", "random:demo_emae"]
        return ["-m", "pipeline", *command, *paths, *self.options, *sets]

    def accuracy(self):
        return json.loads((self.directory / "results.json").read_text())


def test_resume_is_bit_identical_and_two_ranks_agree(labelled_sets, tmp_path):
    one = FinetuneRun(labelled_sets, tmp_path / "one")
    two = FinetuneRun(labelled_sets, tmp_path / "two", "--deepspeed_config", str(ZERO_3))
    one.kill_at(1, "step 7")
    before = one.losses()
    assert len(before) < STEPS and (one.directory / "checkpoints/latest").read_text() == "step-00000004"
    one.train(1)  # trains steps 5 and 6 again
    assert one.losses()[: len(before)] == before and len(one.losses()) == STEPS
    two.train(2)
    assert [loss for _, loss in two.losses()] == approx([loss for _, loss in one.losses()], abs=1e-5)
    assert two.accuracy() == one.accuracy() and two.accuracy()["top1"]["total"] == 42
    evaluated = [[line.get("top1") for line in run.metrics()] for run in (one, two)]
    assert evaluated[0] == evaluated[1] and sum(top1 is not None for top1 in evaluated[0]) == 2
    assert main(["export", str(two.directory), str(tmp_path / "timm"), "--format", "timm"]) == 0


def test_failed_evaluation_saves_and_is_repeated(labelled_sets, tmp_path):
    train, intact = labelled_sets
    run = FinetuneRun((train, shutil.copytree(intact, tmp_path / "val")), tmp_path / "run")
    (key,) = make_undecodable(run.val, 1)
    settings = {"train__steps": 2, "evaluation__every_epochs": "null"}
    assert run.start(1, **settings).wait() == 2
    output, before = run.output.read_text(), run.losses()
    assert repr(key) in output and "saved at step 2" in output and "Traceback" not in output
    assert len(before) == 2 and (run.directory / "checkpoints/latest").read_text() == "step-00000002"
    shutil.copytree(intact, run.val, dirs_exist_ok=True)
    run.train(1, **settings)
    assert run.losses() == before and run.accuracy()["top1"]["total"] == 42
