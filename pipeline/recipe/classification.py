"""The recipe of image classification. The defaults are MAE's for ViT-L (He et al. 2022, Table 9)."""

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.recipe.finetune import EvaluationSection, FinetuneRecipe, TaskName
from pipeline.recipe.sections import Section, eval_resize_size, is_auto


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


class ClassifierEvaluationSection(EvaluationSection):
    """Evaluation of the classifier: pipeline/data/eval_loader.py."""

    resize: int | None = Field(default=None, ge=1)
    """Shorter side in pixels before the center crop; null: MAE's, see `eval_resize_size`."""


class ClassificationRecipe(FinetuneRecipe):
    """Everything that determines the training of a classifier."""

    TASK: ClassVar[TaskName] = "classification"

    classifier: ClassifierSection = ClassifierSection()
    evaluation: ClassifierEvaluationSection = (  # pyright: ignore[reportIncompatibleVariableOverride] (frozen)
        ClassifierEvaluationSection()
    )

    def _validate(self) -> None:
        super()._validate()
        size, resize = self.data.image_size, self.evaluation.resize
        if resize and resize < size:
            raise ValueError(f"evaluation.resize: {resize} px is smaller than data.image_size, {size}")
        if not is_auto(self.engine.micro_batch) and self.engine.micro_batch % self.micro_batch_unit:
            raise ValueError(
                f"engine.micro_batch: {self.engine.micro_batch} is not a multiple of {self.micro_batch_unit}; mixup "
                "and cutmix mix pairs of neighboring images"
            )

    @property
    def micro_batch_unit(self) -> int:
        return self.data.crops_per_image * (2 if self.uses_mixup else 1)

    @property
    def uses_mixup(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.classifier.mixup > 0 or self.classifier.cutmix > 0

    @property
    def eval_resize(self) -> int:
        """Shorter side in pixels before the center crop in evaluation."""
        return self.evaluation.resize or eval_resize_size(self.data.image_size)
