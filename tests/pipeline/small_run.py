"""A run directory as training leaves it, without the training: a small model with weights of its own."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.methods import build_method
from pipeline.models.learner import TrainableModule
from pipeline.recipe import load_recipe
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.finetune import load_finetune_recipe
from pipeline.tasks.classification import Finetuning
from pipeline.train import checkpoint, engine

SMALL = (
    "model.name=vit_tiny",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.decoder_width=16",
    "model.decoder_depth=2",
    "model.decoder_heads=2",
    "data.image_size=48",
)
DATA = [{"path": "sets/photos", "source": "folder", "split": "train", "samples": 960, "of": 1000}]


ALONE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)


def small_run(folder: Path, recipe: str = "vitb16_mae", *overrides: str, step: int = 30) -> Path:
    """Write the run directory `folder` of a pre-training."""
    chosen = load_recipe(recipe, [*SMALL, *overrides])
    torch.manual_seed(0)
    _save(folder, chosen, build_method(chosen), step)
    return folder


def small_classifier(
    folder: Path, sets: tuple[Path, Path], *overrides: str, recipe: str = "vitb16_mae", step: int = 30
) -> Path:
    """Write the run directory `folder` of a fine-tuning, begun and measured on labelled sets. recipe: of the
    random weights that it begins with."""
    folder.mkdir()
    source = folder.with_suffix(".yaml")
    source.write_text(load_recipe(recipe, [*SMALL, "method.lomar.window_size=3"]).to_yaml())
    given = ["data.image_size=48", *overrides]
    task = Finetuning(load_finetune_recipe("finetune_tiny", f"random:{source}", given), str(sets[1]))
    reader = ShardReader(sets[0], task.recipe.data)
    torch.manual_seed(0)
    learner = task.build(reader)
    task.begin(folder, reader, learner, ALONE)
    task.evaluate(step, lambda: None)
    _save(folder, task.recipe, learner, step)
    return folder


def _save(folder: Path, recipe: TrainingRecipe, learner: TrainableModule, step: int) -> None:
    """No weight is at its initial zero or one, so that none can be mixed up with another unseen."""
    checkpoints = folder / "checkpoints"
    partial = checkpoints / (checkpoint.checkpoint_name(step) + checkpoint.PARTIAL)
    partial.mkdir(parents=True)
    for name in (engine.WEIGHTS, engine.WEIGHTS_EMA) if recipe.train.ema_decay else (engine.WEIGHTS,):
        state = {
            key: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
            for key, value in learner.state_dict().items()
        }
        save_file(state, partial / name)
    files = checkpoint.fsync_and_hash(partial, checkpoint.list_files(partial))
    checkpoint.publish(checkpoints, step, {"step": step, "files": files}, recipe.train)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    _write_history(folder)


def _write_history(folder: Path) -> None:
    """Ten steps of 360 images on 2 ranks, a return, and after an interruption 20 on 4, an hour each line."""
    about = {"device": "A GPU", "versions": {"torch": "2.0"}, "commit": "abc"}
    starts = [{"step": 0, "world_size": 2, **about}, {"step": 10, "world_size": 4, **about}]
    (folder / "environment.json").write_text(json.dumps({**starts[-1], "data": DATA, "starts": starts}))
    lines = [{"step": s, "samples": 360 * s, "images_per_s": 1.0} for s in (10, 20, 30, 40)]
    lines.insert(1, {"step": 10, "event": "rollback"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
