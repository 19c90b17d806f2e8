"""The recipe's `method` section: one class per paper.

Invariant: the defaults are the paper's settings, and options that no paper has are off. The exception is
Efficient MAE's `prediction_ratio`, which keeps shapes static.
"""

from typing import Literal

from pydantic import Field

from pipeline.recipe.sections import Section

SCHEDULE_START_BETA = 9 / 16
"""First threshold of the scheduler `schedule` (Table 6 (b)), in patch sides: the smallest beta of Table 8."""


class MaeOptions(Section):
    """Masked Autoencoders Are Scalable Vision Learners (He et al., 2022)."""

    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Share of an image's patches to mask."""


class EmaeOptions(Section):
    """Efficient Masked Autoencoders with Self-Consistency (Li et al.). The mask ratio is 1 - 1/num_parts."""

    num_parts: int = Field(default=4, ge=2, le=32)
    """K: parts to divide an image into; each is encoded alone and predicts all the others. The number of
    pairs in the consistency loss grows with K^2."""
    consistency_weight: float = Field(default=1.0, ge=0.0, le=1e3)
    """Weight of the self-consistency loss."""
    consistency_kind: Literal["l1", "l2", "smooth_l1"] = "l1"
    """Distance between the predictions of two parts."""
    decode_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each part's positions that the other parts decode; all of them decode the same positions."""
    difficulty_flatten: bool = False
    """Not in the paper: apply Efficient MAE's loss and decoder masking to every part, with the options gamma,
    beta, prediction_ratio, k, exact_distance and metric of method.efficient_mae."""


class EfficientMaeOptions(Section):
    """Efficient MAE towards Large-Scale Vision Transformers (Han et al., 2024)."""

    mask_ratio: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Share of an image's patches to mask."""
    gamma: float = Field(default=0.6, ge=0.0, le=10.0)
    """Flattening exponent: a patch of difficulty d has weight d^-gamma (Eq. 2, Table 7)."""
    beta: float | None = Field(default=26.0, gt=0.0)
    """Decoder masking: P2Dist in pixels above which patches are not predicted (Table 8); null: no limit. With
    the scheduler `schedule`, the final threshold."""
    prediction_ratio: float | None = Field(default=0.765, gt=0.0, lt=1.0)
    """Decoder slots, for the easiest masked patches, as a share of all patches; null: one per masked patch.
    Not in the paper; 0.765 is Table 8's number of patches at 26 px, 150 of 196."""
    k: int = Field(default=8, ge=1)
    """Nearest boundary points in Algorithm 1."""
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
    difficulty_flatten: bool = False
    """Not in the paper: apply Efficient MAE's loss inside the windows, with the options gamma, k,
    exact_distance and metric of method.efficient_mae."""


class MethodSection(Section):
    """The pre-training method and the options of each; only those of the named method are used."""

    name: Literal["mae", "emae", "efficient_mae", "lomar"]
    """Pre-training method."""
    normalize_targets: bool = True
    """Normalize each target patch by its own mean and variance (MAE's norm_pix_loss)."""
    mae: MaeOptions = MaeOptions()
    emae: EmaeOptions = EmaeOptions()
    efficient_mae: EfficientMaeOptions = EfficientMaeOptions()
    lomar: LomarOptions = LomarOptions()
