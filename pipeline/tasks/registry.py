"""The tasks of `finetune` by name, and the commands that depend on the task."""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.distributed.collectives import init_distributed, raise_on_all_ranks
from pipeline.distributed.launch import init_dist_env
from pipeline.errors import UserError
from pipeline.io.atomic import atomic_path
from pipeline.pictures.images import iter_images
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.loading import load
from pipeline.recipe.tasks import recipe_kind
from pipeline.tasks.finetune_task import FinetuneTask
from pipeline.train.run_directory import RunDirectory
from pipeline.train.trainer import Trainer
from pipeline.weights.encoder import EMA
from pipeline.weights.run import run_command

logger = logging.getLogger(__name__)


def make_task(recipe: FinetuneRecipe, val: str | None) -> FinetuneTask[Any, Any]:
    """Create the recipe's task; a task's libraries are imported when it is used.

    Args:
        val: Shard set to evaluate on, directory or URL; None for predictions.

    Raises:
        UserError: If a library that the task needs is not installed.
    """
    name = {"classification": "ClassificationTask", "detection": "DetectionTask", "segmentation": "SegmentationTask"}
    return getattr(import_module(f"pipeline.tasks.{recipe.TASK}"), name[recipe.TASK])(recipe, val)


def finetune(recipe: FinetuneRecipe, data: str, val: str, run: Path, deepspeed_config: Path | None = None) -> None:
    """Fine-tune the recipe's weights; the errors are those of `pipeline.train.trainer.Trainer`.

    Args:
        recipe: Recipe with `weights` set.
        data: Annotated shard set to train on: directory or URL.
        val: Annotated shard set to evaluate on.
        run: Run directory, new or to be resumed.
        deepspeed_config: JSON file of engine settings.
    """
    Trainer(make_task(recipe, val), [data], RunDirectory(run), deepspeed_config).train()


def evaluate(source: str, val: str, predictions: Path | None = None) -> dict:
    """Evaluate a fine-tuned model. Every rank calls it.

    Args:
        source: Run directory of `finetune`, or `ema:RUN` for the moving average of its weights.
        val: Annotated shard set to evaluate on: directory or URL.
        predictions: Folder for the predictions; None writes none.

    Returns:
        The task's results as in RUN/results.json, and what was evaluated.

    Raises:
        UserError: If the run has no checkpoint, or the set lacks the annotations or has other classes.
    """
    run, ema, recipe = _read_source(source)
    task = make_task(recipe, val)
    with init_distributed(recipe.engine.timeout_minutes) as dist_info:
        trained = raise_on_all_ranks(lambda: task.restore(run, ema))
        task.module.to(dist_info.device)
        task.prepare_evaluation(dist_info)
        results = task.compute_results(lambda: None, predictions)
    described = {"task": recipe.TASK, "run": str(run), "ema": ema, "step": trained.step, "val": task.describe_val()}
    return {**described, **results.values}


def format_results(result: dict) -> str:
    """Return an evaluation as text."""
    lines = [f"{result['task']}: step {result['step']} of {result['run']} on {result['val']['samples']} images"]
    for name, value in result.items():
        share = value["accuracy"] if isinstance(value, dict) and "accuracy" in value else value
        if isinstance(share, float):
            lines.append(f"  {name:<14} {share:.4f}")
    return "\n".join(lines)


def predict(source: str, images: Sequence[Path], out: Path) -> str:
    """Draw what a fine-tuned model predicts.

    Args:
        source: As for `evaluate`.
        images: Image files, or folders, which are searched recursively.
        out: Folder; gets a PNG for each image.

    Returns:
        A sentence for the user.

    Raises:
        UserError: If the run has no checkpoint, or there is no readable image.
    """
    run, ema, recipe = _read_source(source)
    task = make_task(recipe, None)
    task.restore(run, ema)
    task.module.to(init_dist_env().device)
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, image in iter_images(images):
        with atomic_path(out / f"{name}.png") as path:
            task.draw_prediction(image).save(path, "PNG")
        count += 1
    if not count:
        raise UserError(f"--images {', '.join(map(str, images))}: no readable image found")
    return f"{out}: {count} pictures"


def _read_source(source: str) -> tuple[Path, bool, FinetuneRecipe]:
    """Return run directory, whether to use the moving average, and recipe."""
    run, ema = Path(source.removeprefix(EMA)), source.startswith(EMA)
    command = run_command(run)
    if command != FinetuneRecipe.COMMAND:
        raise UserError(f"{run}: is a run of {command}; give a run of finetune")
    path = RunDirectory(run).recipe_file
    return run, ema, load(recipe_kind(path), path)
