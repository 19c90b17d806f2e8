"""The recipe of fine-tuning.

Invariant: a `FinetuneRecipe` that exists is possible, whatever weights it begins with; what weights and data
must be like is checked when they are opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.loading import load
from pipeline.recipe.sections import Section, resize_of


class ClassifierSection(Section):
    """What is trained beside the schedule. The defaults are MAE's for ViT-L (He et al. 2022, Table 9)."""

    encoder: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] | None = None
    """What these settings are for: weights of another size are refused. null: any will do."""
    layer_decay: float = Field(0.75, gt=0.0, le=1.0)
    """A block's learning rate is so much of the next one's."""
    drop_path: float = Field(0.1, ge=0.0, lt=1.0)
    """Stochastic depth: the share of images that skip the last block, falling linearly to 0 at the first."""
    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    mixup: float = Field(0.8, ge=0.0, le=1.0)
    """alpha of Beta(alpha, alpha); 0: none. Where both are given, half of the pairs take each."""
    cutmix: float = Field(1.0, ge=0.0, le=1.0)
    erasing: float = Field(0.25, ge=0.0, le=1.0)
    """The share of images that lose a rectangle to noise."""
    rand_augment: float | None = Field(9.0, ge=0.0, le=10.0)
    """Mean strength of RandAugment; null: none."""
    rand_augment_deviation: float = Field(0.5, ge=0.0)


class EvaluationSection(Section):
    """How a classifier is judged: pipeline/data/eval_loader.py."""

    every_epochs: float | None = Field(None, gt=0.0)
    """null: at the end alone, where it always is."""
    resize: int | None = Field(None, ge=1)
    """Pixels of the shorter side before the centre is cut out; null: as MAE, `resize_of`."""


class FinetuneRecipe(TrainingRecipe):
    """What is fine-tuned, on what, and how. `load_finetune_recipe` makes one."""

    COMMAND = "finetune"
    FOREIGN_SECTIONS = {"method": "pretrain"}  # noqa: RUF012 (not a field)

    weights: str | None = None
    """Where the encoder begins, as `evals.encoder.load_encoder` understands it; --weights sets it."""
    classifier: ClassifierSection = ClassifierSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _validate(self) -> "FinetuneRecipe":
        size, resize, crops = self.data.image_size, self.evaluation.resize, self.data.crops_per_image
        if resize and resize < size:
            raise ValueError(f"evaluation.resize: {resize} px hold no square of data.image_size, {size}")
        if self.mixes and self.engine.micro_batch % (2 * crops):
            raise ValueError(
                f"engine.micro_batch: {self.engine.micro_batch} is no multiple of {2 * crops}; mixup and "
                "cutmix mix neighbours"
            )
        return self

    @property
    def mixes(self) -> bool:
        return self.classifier.mixup > 0 or self.classifier.cutmix > 0

    @property
    def resize(self) -> int:
        """Pixels of the shorter side in evaluation."""
        return self.evaluation.resize or resize_of(self.data.image_size)


def load_finetune_recipe(
    name_or_path: str | Path, weights: str, overrides: Sequence[str] = ()
) -> FinetuneRecipe:
    """As `pipeline.recipe.load_recipe`, for the weights that are fine-tuned."""
    return load(FinetuneRecipe, name_or_path, overrides).model_copy(update={"weights": weights})
