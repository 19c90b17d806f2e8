"""The recipe's `method` section: one class per paper.

Invariant: the defaults are the paper's settings; the papers' ablations and options that no paper has are off.
"""

import logging
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe.sections import Section

logger = logging.getLogger(__name__)

SCHEDULE_START_BETA = 9 / 16
"""First threshold of the scheduler `schedule` (Table 6 (b)), in patch sides: the smallest beta of Table 8."""


class MaeOptions(Section):
    """Masked Autoencoders Are Scalable Vision Learners (He et al., 2022)."""

    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Share of an image's patches to mask."""
    mask_sampling: Literal["random", "block", "grid"] = "random"
    """Table 1 (f): random patches; BEiT's random blocks; or one visible patch in each 2 x 2, which requires
    mask_ratio 0.75 and an even number of patches along a side."""
    mask_tokens_in_encoder: bool = False
    """Table 1 (c): the encoder also processes a mask token for every masked patch."""


class EmaeOptions(Section):
    """Efficient Masked Autoencoders with Self-Consistency (Li et al.). The mask ratio is 1 - 1/num_parts."""

    num_parts: int = Field(default=4, ge=2, le=32)
    """K: parts to divide an image into; each is encoded alone and predicts all the others. The number of
    pairs in the consistency loss grows with K^2."""
    consistency_weight: float = Field(default=1.0, ge=0.0, le=1e3)
    """Weight of the self-consistency loss."""
    consistency_kind: Literal["l1", "l2", "smooth_l1"] = "l1"
    """Distance between the predictions of two parts."""
    consistency_mean: Literal["overlap", "all"] = "overlap"
    """Average the distance over the patches masked in both parts, or divide its sum over them by the number of all
    patches, which is smaller by the factor (num_parts - 2) / num_parts."""
    decode_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each part's positions that the other parts decode; all of them decode the same positions."""
    difficulty_flatten: bool = False
    """Not in the paper: apply Efficient MAE's loss and decoder masking to every part, with the options gamma,
    beta, prediction_ratio, num_nearest, exact_distance and metric of method.efficient_mae."""


class EfficientMaeOptions(Section):
    """Efficient MAE towards Large-Scale Vision Transformers (Han et al., 2024)."""

    mask_ratio: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Share of an image's patches to mask."""
    gamma: float = Field(default=0.6, ge=0.0, le=10.0)
    """Flattening exponent: a patch of difficulty d has weight d^-gamma (Eq. 2, Table 7)."""
    beta: float | None = Field(default=26.0, gt=0.0)
    """Decoder masking: P2Dist in pixels above which patches are not predicted (Table 8); null: no limit. With
    the scheduler `schedule`, the final threshold."""
    prediction_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["auto"] | None = "auto"
    """Decoder slots, for the easiest masked patches. auto: the mean number of patches that beta keeps, over random
    masks with a fixed seed, rounded down (Table 8); a number: this share of all patches; null: one slot per masked
    patch."""
    num_nearest: int = Field(default=8, ge=1)
    """P2Dist: number of nearest boundary points, k in Algorithm 1."""
    exact_distance: bool = False
    """Compute P2Dist by Eq. 1 instead of Algorithm 1."""
    metric: Literal["p2dist", "neighbors_3x3", "inverse_distance_5x5", "nearest_patch"] = "p2dist"
    """Measure of difficulty: the paper's own, or row (a), (b) or (c) of Table 5."""
    scheduler: Literal["flatten", "threshold", "schedule", "normalize"] = "flatten"
    """Use of the difficulty: the paper's own, or row (a), (b) or (c) of Table 6."""


class LomarOptions(Section):
    """Efficient Self-supervised Vision Pretraining with Local Masked Reconstruction (Chen et al., 2022)."""

    num_windows: int = Field(default=4, ge=1)
    """Windows per image."""
    window_size: int = Field(default=7, ge=1)
    """Side of a window, in patches."""
    mask_ratio: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Share of a window's patches to mask."""
    windows: Literal["per_image", "as_released"] = "per_image"
    """per_image: every image has its own windows (Figure 2). as_released: the images of a micro batch share
    num_windows windows and are paired with them as by the released code, so the loss depends on the micro batch."""
    decoder: bool = False
    """Figure 4: encode only the visible patches of a window, with absolute positions, and predict the others with
    MAE's decoder."""
    difficulty_flatten: bool = False
    """Not in the paper: apply Efficient MAE's loss inside the windows, with the options gamma,
    num_nearest, exact_distance and metric of method.efficient_mae."""


class BeitOptions(Section):
    """BEiT: BERT Pre-Training of Image Transformers (Bao et al., 2022)."""

    mask_ratio: float = Field(default=75 / 196, gt=0.0, lt=1.0)
    """Share of an image's patches to mask, in blocks; 75 of 196 in the paper's code."""
    layer_scale: float = Field(default=0.1, gt=0.0)
    """Initial scale of each residual branch."""
    drop_path: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Stochastic depth: probability to drop the branches of the last block; it rises linearly from 0."""


class TargetSection(Section):
    """What is predicted for each masked patch."""

    name: Literal["pixels", "normalized_pixels", "pca", "hog", "tokens"] = "normalized_pixels"
    """pixels; normalized_pixels: by the patch's own mean and variance (MAE's norm_pix_loss); pca: principal components
    of the patch's pixels, fitted to the first images of the shard set (MAE, Table 1 (d)); hog: histograms of oriented
    gradients (MaskFeat); tokens: visual tokens of a discrete VAE (BEiT). emae and efficient_mae predict pixels only."""
    components: int = Field(default=96, ge=1)
    """For pca: number of components."""
    tokenizer: str | None = Field(default=None, min_length=1)
    """For tokens: folder with transformers' FlavaImageCodebook, DALL-E's tokenizer."""
    vocabulary: int = Field(default=8192, ge=2)
    """For tokens: number of tokens of the tokenizer."""

    def _validate(self) -> None:
        if (self.name == "tokens") != (self.tokenizer is not None):
            raise ValueError("method.target.tokenizer: give a folder if method.target.name is tokens, and only then")


class MethodSection(Section):
    """The pre-training method and the options of each; only those of the named method are used."""

    name: Literal["mae", "emae", "efficient_mae", "lomar", "beit"]
    """Pre-training method."""
    target: TargetSection = TargetSection()
    """Prediction target."""
    beit: BeitOptions = BeitOptions()
    mae: MaeOptions = MaeOptions()
    emae: EmaeOptions = EmaeOptions()
    efficient_mae: EfficientMaeOptions = EfficientMaeOptions()
    lomar: LomarOptions = LomarOptions()

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, tree: Any) -> Any:
        """Accept the deprecated key `normalize_targets`."""
        if not isinstance(tree, dict) or "normalize_targets" not in tree:
            return tree
        tree = dict(tree)
        normalized, target = tree.pop("normalize_targets"), dict(tree.get("target") or {})
        if "name" in target:
            raise ValueError("method.normalize_targets: is deprecated; give only method.target.name")
        if not isinstance(normalized, bool):
            raise ValueError(f"method.normalize_targets: input should be a valid boolean, got {normalized!r}")
        target["name"] = "normalized_pixels" if normalized else "pixels"
        logger.warning(f"method.normalize_targets is deprecated; use method.target.name: {target['name']}")
        return {**tree, "target": target}

    @property
    def normalize_targets(self) -> bool:
        """Whether the target is pixels, normalized per patch."""
        return self.target.name == "normalized_pixels"
