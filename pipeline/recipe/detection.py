"""The recipe of detection and instance segmentation. The defaults are ViTDet's for ViT-B (Li et al. 2022)."""

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.recipe.finetune import DenseRecipe, TaskName
from pipeline.recipe.sections import Section


class DetectorSection(Section):
    """Mask R-CNN on a ViT with a simple feature pyramid, and its augmentation."""

    encoder: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] | None = None
    """Encoder size that these settings are for; weights of another size are an error. null: any size."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch in pixels; a patch embedding of another size is resized."""
    window_size: int = Field(default=14, ge=1)
    """Side in patches of the windows of local attention; the last block of each quarter attends globally."""
    layer_decay: float = Field(default=0.7, gt=0.0, le=1.0)
    """Ratio of a block's learning rate to the next block's."""
    drop_path: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Stochastic depth: drop rate of the last block, decreasing linearly to 0 at the first."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: range of the resized image's size, relative to the largest that fits on the canvas."""
    width: int = Field(default=256, ge=1)
    """Channels of the pyramid and of the heads' convolutions."""
    head_convs: int = Field(default=4, ge=0)
    """Convolutions of the box head and of the mask head."""
    fc_width: int = Field(default=1024, ge=1)
    """Width of the box head's linear layer."""
    samples_per_image: int = Field(default=512, ge=1)
    """Proposals per image that the box head is trained on."""

    def _validate(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"detector.scale: [{low}, {high}] is not a range of positive numbers")


class DetectionRecipe(DenseRecipe):
    """Everything that determines the training of a detector."""

    TASK: ClassVar[TaskName] = "detection"

    detector: DetectorSection = DetectorSection()

    def _validate(self) -> None:
        super()._validate()
        size, stride = self.data.image_size, 2 * self.detector.patch_size
        if size % stride:
            raise ValueError(
                f"data.image_size: {size} is not a multiple of {stride}, twice detector.patch_size, as the feature "
                "pyramid needs"
            )
