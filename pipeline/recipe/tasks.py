"""The kinds of recipe of `finetune`, by the recipe's `task.name`."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.detection import DetectionRecipe
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.loading import find_recipe, load, read_yaml
from pipeline.recipe.segmentation import SegmentationRecipe

TASK_RECIPES: dict[str, type[FinetuneRecipe]] = {
    kind.TASK: kind for kind in (ClassificationRecipe, DetectionRecipe, SegmentationRecipe)
}


def load_finetune_recipe(name_or_path: str | Path, weights: str, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Read a fine-tuning recipe like `pipeline.recipe.load_recipe`, and set its initial weights."""
    kind = recipe_kind(find_recipe(name_or_path))
    return load(kind, name_or_path, overrides).model_copy(update={"weights": weights})


def recipe_kind(path: Path) -> type[FinetuneRecipe]:
    """Return the class for a recipe file. Raises UserError if its task is unknown."""
    task = read_yaml(path).get("task", {})
    name = task.get("name", "classification") if isinstance(task, dict) else task
    if not isinstance(name, str) or name not in TASK_RECIPES:
        raise UserError(f"{path}: task.name: {name!r} is unknown; choose {', '.join(TASK_RECIPES)}")
    return TASK_RECIPES[name]
