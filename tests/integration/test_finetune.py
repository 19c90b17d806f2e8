"""Fine-tuning trains by the loop that pre-training trains by: what it computes depends on recipe and data."""

import json

from pytest import approx
from runs import Run

RECIPE = {  # everything that is random is on
    "data.image_size": 32,
    "data.global_batch": 16,
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


class Tuning(Run):
    """A run of `finetune`, from random weights."""

    def __init__(self, sets, directory):
        super().__init__(sets[0], directory)
        self.val = sets[1]

    def command(self, ranks, settings):
        small = "random:demo_emae"
        sets = [f"--set={key}={value}" for key, value in {**RECIPE, **settings}.items()]
        arguments = ["finetune", "finetune_tiny", "--weights", small, "--data", str(self.shards)]
        return self.launched(
            ranks, "pipeline", [*arguments, "--val", str(self.val), "--run", str(self.directory), *sets]
        )

    def accuracy(self):
        return json.loads((self.directory / "accuracy.json").read_text())


def test_killed_and_continued_to_the_bit_and_on_two_ranks_the_same(labelled_sets, tmp_path):
    alone, killed, two = (Tuning(labelled_sets, tmp_path / name) for name in ("alone", "killed", "two"))
    alone.train(1)
    killed.kill_when(killed.start(1), lambda: (killed.directory / "checkpoints" / "latest").exists())
    assert len(killed.losses()) < 8
    killed.train(1)
    assert killed.losses() == alone.losses() and killed.accuracy() == alone.accuracy()
    two.train(2, engine__zero_stage=2)
    assert [loss for _, loss in two.losses()] == approx([loss for _, loss in alone.losses()], abs=1e-5)
    assert two.accuracy() == alone.accuracy()
    assert alone.accuracy()["top1"]["total"] == 42
