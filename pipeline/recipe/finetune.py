"""The common part of the recipes of fine-tuning. Each task has its own kind of recipe: `recipe.tasks`.

Invariant: a `FinetuneRecipe` is valid for any initial weights; weights and data are checked when they are
opened.
"""

from typing import ClassVar, Literal

from pipeline.recipe.sections import Section, mutable
from pipeline.recipe.training import TrainingRecipe

TaskName = Literal["classification", "detection", "segmentation"]


class TaskSection(Section):
    """What is trained."""

    name: TaskName = "classification"
    """Decides which other sections the recipe has, so --set cannot change it."""


class EvaluationSection(Section):
    """Evaluation on the validation set."""

    every_epochs: float | None = mutable(None, gt=0.0)
    """Epochs between evaluations; the last step is always evaluated. null: only the last step."""


class FinetuneRecipe(TrainingRecipe):
    """What all tasks have in common; recipes are read by `recipe.tasks.load_finetune_recipe`."""

    COMMAND: ClassVar[str] = "finetune"
    FOREIGN_SECTIONS: ClassVar[dict[str, str]] = {"method": "pretrain"}
    TASK: ClassVar[TaskName]

    task: TaskSection = TaskSection()
    weights: str | None = None
    """Initial weights, as given by --weights."""
    evaluation: EvaluationSection = EvaluationSection()

    def _validate(self) -> None:
        super()._validate()
        if self.task.name != self.TASK:
            raise ValueError(f"task.name: {self.task.name}: the recipe is for {self.TASK}; choose another recipe")


class DenseRecipe(FinetuneRecipe):
    """What detection and segmentation have in common."""

    def _validate(self) -> None:
        super()._validate()
        if self.data.crops_per_image > 1:
            raise ValueError(f"data.crops_per_image: must be 1 for {self.TASK}")
