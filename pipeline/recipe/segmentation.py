"""The recipe of semantic segmentation. The defaults are those of UperNet on MAE's ViT-B (He et al. 2022)."""

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.recipe.finetune import DenseRecipe, TaskName
from pipeline.recipe.sections import Section


class SegmenterSection(Section):
    """UperNet on a ViT, its augmentation, and its sliding window."""

    encoder: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] | None = None
    """Encoder size that these settings are for; weights of another size are an error. null: any size."""
    relative_positions: bool = True
    """Add BEiT's relative position bias and layer scale to each block, besides the absolute positions."""
    channels: int | None = Field(default=None, ge=1)
    """Channels of the UperNet head; null: the encoder's width."""
    auxiliary_channels: int = Field(default=256, ge=1)
    """Channels of the auxiliary FCN head."""
    auxiliary_weight: float = Field(default=0.4, ge=0.0)
    """Weight of the auxiliary head's loss."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the channels that are dropped before the classifiers."""
    layer_decay: float = Field(default=0.65, gt=0.0, le=1.0)
    """Ratio of a block's learning rate to the next block's."""
    drop_path: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Stochastic depth: drop rate of the last block, decreasing linearly to 0 at the first."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor by which an image is resized, relative to a shorter side of data.image_size."""
    cat_max_ratio: float = Field(default=0.75, gt=0.0)
    """Share of a crop that one class may cover, or another crop is drawn, up to ten times; above 1: no limit."""
    photometric: bool = True
    """Distort brightness, contrast, saturation and hue."""
    window_stride: int | None = Field(default=None, ge=1)
    """Pixels between the windows of evaluation, which are as large as the crops; null: two thirds of that."""

    def _validate(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"segmenter.scale: [{low}, {high}] is not a range of positive numbers")


class SegmentationRecipe(DenseRecipe):
    """Everything that determines the training of a segmentation model."""

    TASK: ClassVar[TaskName] = "segmentation"

    segmenter: SegmenterSection = SegmenterSection()

    def _validate(self) -> None:
        super()._validate()
        size, stride = self.data.image_size, self.segmenter.window_stride
        if stride and stride > size:
            raise ValueError(f"segmenter.window_stride: {stride} leaves gaps between windows of {size} px; reduce it")
        if self.engine.compile:
            raise ValueError("engine.compile: not supported by batch normalization over ranks; set it to false")

    @property
    def window_stride(self) -> int:
        """Pixels between the windows of evaluation: 341 for the published 512."""
        return self.segmenter.window_stride or max(1, 2 * self.data.image_size // 3)
