"""The recipe of fine-tuning.

Invariant: a `FinetuneRecipe` is valid for any initial weights; weights and data are checked when they are
opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.recipe.loading import load
from pipeline.recipe.sections import Section, eval_resize_size, mutable
from pipeline.recipe.training import TrainingRecipe


class ClassifierSection(Section):
    """Layer decay and regularization. The defaults are MAE's for ViT-L (He et al. 2022, Table 9)."""

    encoder: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] | None = None
    """Encoder size that these settings are for; weights of another size are an error. null: any size."""
    layer_decay: float = Field(default=0.75, gt=0.0, le=1.0)
    """Ratio of a block's learning rate to the next block's."""
    trained_blocks: int | None = Field(default=None, ge=0)
    """Train only this many last blocks, the final norm and the head (MAE's Figure 9); null: everything."""
    drop_path: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Stochastic depth: drop rate of the last block, decreasing linearly to 0 at the first."""
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the target probability to spread over all classes."""
    mixup: float = Field(default=0.8, ge=0.0, le=1.0)
    """alpha of mixup's Beta(alpha, alpha); 0: no mixup. With cutmix, half of the pairs get each."""
    cutmix: float = Field(default=1.0, ge=0.0, le=1.0)
    """alpha of cutmix's Beta(alpha, alpha); 0: no cutmix."""
    erasing: float = Field(default=0.25, ge=0.0, le=1.0)
    """Probability of random erasing."""
    rand_augment: float | None = Field(default=9.0, ge=0.0, le=10.0)
    """Mean magnitude of RandAugment; null: no RandAugment."""
    rand_augment_deviation: float = Field(default=0.5, ge=0.0)
    """Standard deviation of RandAugment's magnitude."""


class EvaluationSection(Section):
    """Evaluation of the classifier: pipeline/data/eval_loader.py."""

    every_epochs: float | None = mutable(None, gt=0.0)
    """Epochs between evaluations; the last step is always evaluated. null: only the last step."""
    resize: int | None = Field(default=None, ge=1)
    """Shorter side in pixels before the center crop; null: MAE's, see `eval_resize_size`."""


class FinetuneRecipe(TrainingRecipe):
    """Everything that determines a fine-tuning run; read by `load_finetune_recipe`."""

    COMMAND: ClassVar[str] = "finetune"
    FOREIGN_SECTIONS: ClassVar[dict[str, str]] = {"method": "pretrain"}

    weights: str | None = None
    """Initial weights, as given by --weights."""
    classifier: ClassifierSection = ClassifierSection()
    evaluation: EvaluationSection = EvaluationSection()

    def _validate(self) -> None:
        super()._validate()
        size, resize, crops = self.data.image_size, self.evaluation.resize, self.data.crops_per_image
        if resize and resize < size:
            raise ValueError(f"evaluation.resize: {resize} px is smaller than data.image_size, {size}")
        if self.uses_mixup and self.engine.micro_batch % (2 * crops):
            raise ValueError(
                f"engine.micro_batch: {self.engine.micro_batch} is not a multiple of {2 * crops}; mixup and "
                "cutmix mix pairs of neighboring images"
            )

    @property
    def uses_mixup(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.classifier.mixup > 0 or self.classifier.cutmix > 0

    @property
    def eval_resize(self) -> int:
        """Shorter side in pixels before the center crop in evaluation."""
        return self.evaluation.resize or eval_resize_size(self.data.image_size)


def load_finetune_recipe(name_or_path: str | Path, weights: str, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Read a fine-tuning recipe like `pipeline.recipe.load_recipe`, and set its initial weights."""
    return load(FinetuneRecipe, name_or_path, overrides).model_copy(update={"weights": weights})
