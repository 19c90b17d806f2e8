"""Run directories as training writes them, with a small model and random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.methods import build_method
from pipeline.models.trainable_module import TrainableModule
from pipeline.recipe import load_recipe
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.recipe.training import TrainingRecipe
from pipeline.tasks.classification import ClassificationTask
from pipeline.train import checkpoint, engine
from pipeline.train.run_directory import RunDirectory

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
SINGLE_PROCESS = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)


def small_run(
    folder: Path, recipe: str = "vitb16_mae", *overrides: str, step: int = 30, broken: str | None = None
) -> Path:
    """Write the run directory of a pre-training; one value of the weight `broken` is NaN."""
    small_recipe = load_recipe(recipe, [*SMALL, *overrides])
    torch.manual_seed(0)
    method = build_method(small_recipe)
    if broken:
        method.get_parameter(broken).data.view(-1)[0] = torch.nan
    _write_run(folder, small_recipe, method, step)
    return folder


def small_classifier(
    folder: Path, sets: tuple[Path, Path], *overrides: str, recipe: str = "vitb16_mae", step: int = 30
) -> Path:
    """Write the run directory of a fine-tuning, evaluated once, from random weights of a pre-training recipe."""
    folder.mkdir()
    source = folder.with_suffix(".yaml")
    source.write_text(load_recipe(recipe, [*SMALL, "method.lomar.window_size=3"]).to_yaml())
    settings = ["data.image_size=48", *overrides]
    task = ClassificationTask(load_finetune_recipe("finetune_tiny", f"random:{source}", settings), str(sets[1]))
    reader = ShardReader(sets[0], task.recipe.data)
    torch.manual_seed(0)
    classifier = task.build(reader)
    task.setup(RunDirectory(folder), reader, classifier, SINGLE_PROCESS)
    task.evaluate(step, lambda: None)
    _write_run(folder, task.recipe, classifier, step)
    return folder


def _write_run(folder: Path, recipe: TrainingRecipe, module: TrainableModule, step: int) -> None:
    """Write checkpoint, recipe and history. All weights get noise, so that none are equal by initialization."""
    checkpoints = folder / "checkpoints"
    partial = checkpoints / (checkpoint.checkpoint_name(step) + checkpoint.PARTIAL)
    partial.mkdir(parents=True)
    for name in (engine.WEIGHTS, engine.WEIGHTS_EMA) if recipe.train.ema_decay else (engine.WEIGHTS,):
        state = {
            key: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
            for key, value in module.state_dict().items()
        }
        save_file(state, partial / name)
    files = checkpoint.fsync_and_hash(partial, checkpoint.list_files(partial))
    checkpoint.publish(checkpoints, step, {"step": step, "files": files}, recipe.train)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    _write_history(folder)


def _write_history(folder: Path) -> None:
    """Write a history of one hour per line: 10 steps on 2 ranks, a rollback, a resume, 30 steps on 4 ranks."""
    environment = {"device": "A GPU", "versions": {"torch": "2.0"}, "commit": "abc"}
    starts = [{"step": 0, "world_size": 2, **environment}, {"step": 10, "world_size": 4, **environment}]
    (folder / "environment.json").write_text(json.dumps({**starts[-1], "data": DATA, "starts": starts}))
    lines = [{"step": s, "samples": 360 * s, "images_per_s": 1.0} for s in (10, 20, 30, 40)]
    lines.insert(1, {"step": 10, "event": "rollback"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
