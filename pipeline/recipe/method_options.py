"""The options of every method: the recipe's `method` section, one class a paper.

Invariant: the defaults are the paper's, and what no paper has is off. One default is not: Efficient MAE's
`prediction_ratio`, which keeps shapes static.
"""

from typing import Literal

from pydantic import Field

from pipeline.recipe.sections import Section

EASIEST_BETA = 9 / 16  # patches; where the threshold of Table 6 (b) starts to grow: Table 8's smallest beta


class MaeOptions(Section):
    """Masked Autoencoders Are Scalable Vision Learners (He et al., 2022)."""

    mask_ratio: float = Field(0.75, gt=0.0, lt=1.0)


class EmaeOptions(Section):
    """Efficient Masked Autoencoders with Self-Consistency (Li et al.). The mask ratio is 1 - 1/num_parts."""

    num_parts: int = Field(4, ge=2, le=32)
    """K: parts an image is divided into; each is encoded alone and predicts all the others. The pairs whose
    consistency is asked for grow with its square."""
    consistency_weight: float = Field(1.0, ge=0.0, le=1e3)
    consistency_kind: Literal["l1", "l2", "smooth_l1"] = "l1"
    decode_share: float = Field(1.0, gt=0.0, le=1.0)
    """Share of each part's masked positions that is decoded; the same for every part that misses them."""
    difficulty_flatten: bool = False
    """Not in the paper: Efficient MAE's loss and decoder masking on every part, with method.efficient_mae's
    gamma, beta, prediction_ratio, k, exact_distance and metric."""


class EfficientMaeOptions(Section):
    """Efficient MAE towards Large-Scale Vision Transformers (Han et al., 2024)."""

    mask_ratio: float = Field(0.85, gt=0.0, lt=1.0)
    gamma: float = Field(0.6, ge=0.0, le=10.0)
    """Flattening: a patch of difficulty d weighs d^-gamma (Eq. 2, Table 7)."""
    beta: float | None = Field(26.0, gt=0.0)
    """Decoder masking: patches with a P2Dist above so many pixels are left out (Table 8); null: none is. With
    the scheduler `schedule` it is where the threshold ends."""
    prediction_ratio: float | None = Field(0.765, gt=0.0, lt=1.0)
    """Slots of the decoder for the easiest masked patches, as a share of all patches; null: one for each.
    Not in the paper; 0.765 is Table 8's number of patches at 26 px, 150 of 196."""
    k: int = Field(8, ge=1)
    """Nearest boundary points in Algorithm 1."""
    exact_distance: bool = False
    """P2Dist by Eq. 1 instead of Algorithm 1."""
    metric: Literal["p2dist", "neighbors_3x3", "inverse_distance_5x5", "nearest_patch"] = "p2dist"
    """What difficulty is: the paper's own, or row (a), (b) or (c) of Table 5."""
    scheduler: Literal["flatten", "threshold", "schedule", "normalize"] = "flatten"
    """What is done about difficulty: the paper's own, or row (a), (b) or (c) of Table 6."""


class LomarOptions(Section):
    """Efficient Self-supervised Vision Pretraining with Local Masked Reconstruction (Chen et al., 2022)."""

    num_windows: int = Field(4, ge=1)
    window_size: int = Field(7, ge=1)
    """Patches along a window's side."""
    mask_ratio: float = Field(0.8, gt=0.0, lt=1.0)
    """Of each window."""
    difficulty_flatten: bool = False
    """Not in the paper: Efficient MAE's loss inside the windows, with method.efficient_mae's gamma, k,
    exact_distance and metric."""


class MethodSection(Section):
    name: Literal["mae", "emae", "efficient_mae", "lomar"]
    normalize_targets: bool = True
    """Predict each patch's pixels normalised by the patch's own mean and variance (MAE's norm_pix_loss)."""
    mae: MaeOptions = MaeOptions()
    emae: EmaeOptions = EmaeOptions()
    efficient_mae: EfficientMaeOptions = EfficientMaeOptions()
    lomar: LomarOptions = LomarOptions()
