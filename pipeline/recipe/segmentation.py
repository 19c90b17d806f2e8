"""The recipe of semantic segmentation."""

from typing import ClassVar

from pipeline.recipe.finetune import DenseRecipe, TaskName


class SegmentationRecipe(DenseRecipe):
    """Everything that determines the training of a segmentation model."""

    TASK: ClassVar[TaskName] = "segmentation"
