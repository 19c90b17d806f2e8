"""Efficient MAE: "Efficient MAE towards Large-Scale Vision Transformers", Han et al., WACV 2024.

MAE at mask ratio 0.85. The Difficulty-Flatten Loss weights each masked patch by d^-gamma, where d is its
difficulty P2Dist (Eq. 1, Algorithm 1, Eq. 2). Decoder masking drops patches with d > beta before the decoder
(Section 4.2). The ablations of Table 5 (`metric`) and Table 6 (`scheduler`) are options.

The threshold keeps a different number of patches in each image. For static shapes, the decoder predicts the
same number for every image, the easiest `num_predicted` masked patches, and applies the threshold as an
attention mask. The loss equals that of really dropping the patches, and an image's loss does not depend on
other images. By default the number is the mean that the threshold keeps: if an image has more patches within
it, the hardest are dropped (docs/methods.md). If `prediction_ratio` is null, only the threshold drops patches.
"""

from dataclasses import dataclass
from typing import Self

import torch

from pipeline.difficulty import Metric, difficulty
from pipeline.losses import difficulty_flatten_loss, patch_error, weighted_mean
from pipeline.masking import as_mask, gather_tokens, random_split
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.methods.registry import register_method
from pipeline.methods.targets import build_target
from pipeline.recipe import Recipe
from pipeline.recipe.mask_statistics import sample_difficulties
from pipeline.recipe.method_options import SCHEDULE_START_BETA

REFERENCE_MASK_RATIO = 0.75  # MAE's, with which Table 6 (c) compares
NUM_INTERVALS = 16


@dataclass(frozen=True)
class DifficultyFlatten:
    """Settings of the Difficulty-Flatten Loss and of decoder masking, shared with EMAE and LoMaR."""

    patch_size: int
    gamma: float  # exponent of Eq. 2, at least 0; 0 weights all patches equally
    beta: float | None  # threshold of decoder masking in pixels; None for no threshold
    metric: Metric
    exact: bool  # P2Dist by Eq. 1 instead of Algorithm 1
    num_nearest: int  # k of Algorithm 1: number of nearest boundary points

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        options = recipe.method.efficient_mae
        return cls(
            patch_size=recipe.model.patch_size,
            gamma=options.gamma,
            beta=options.beta,
            metric=options.metric,
            exact=options.exact_distance,
            num_nearest=options.num_nearest,
        )

    def compute_difficulty(self, visible_ids: torch.Tensor, grid: int) -> torch.Tensor:
        """Compute the difficulty of every patch of a grid x grid image: (N, V) -> float32 (N, L)."""
        visible = as_mask(visible_ids, grid * grid).view(-1, grid, grid)
        return difficulty(visible, self.patch_size, self.metric, self.exact, self.num_nearest).flatten(1)

    def keep_mask(self, distance: torch.Tensor, beta: float | torch.Tensor | None) -> torch.Tensor | None:
        """Return which patches the threshold keeps, or None if all are always kept (faster attention)."""
        if beta is not None:
            return distance <= beta
        return distance.isfinite() if self.metric in ("neighbors_3x3", "inverse_distance_5x5") else None


def select_easiest(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices of the `count` smallest distances (..., M), in ascending order: int64 (..., count).

    Distances are rounded to 1/1024, because equal ones may differ in their last bits between devices.
    """
    return (distance * 1024).round().argsort(dim=-1, stable=True)[..., :count]


@register_method("efficient_mae")
class EfficientMAE(Method):
    """Encode `num_visible` patches of an image and predict the `num_predicted` easiest of the others."""

    progress: torch.Tensor
    interval_weights: torch.Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, self.decoder = build_encoder(recipe), build_decoder(recipe)
        self.num_visible, self.num_predicted = recipe.num_visible, recipe.num_predicted
        self.difficulty_flatten = DifficultyFlatten.from_recipe(recipe)
        self.scheduler = recipe.method.efficient_mae.scheduler
        self.target = build_target(recipe)
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = recipe.num_patches
        if self.scheduler == "schedule":
            # An integer, in millionths, because a cast of the module to bf16 would round a fraction.
            self.register_buffer("progress", torch.zeros((), dtype=torch.int64), persistent=False)
        if self.scheduler == "normalize":
            weights = torch.empty(NUM_INTERVALS)  # on the caller's default device
            if not weights.is_meta:
                weights.copy_(compute_interval_weights(self.grid, self.num_visible, self.difficulty_flatten))
            self.register_buffer("interval_weights", weights, persistent=False)

    def set_training_progress(self, progress: float) -> None:
        if self.scheduler == "schedule":
            self.progress.fill_(round(progress * 1e6))

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with M = num_predicted, in ascending order of difficulty.

        Predictions of patches beyond the threshold are undefined.
        """
        patches = self.patchify(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        distance = self.difficulty_flatten.compute_difficulty(visible_ids, self.grid).gather(1, masked_ids)
        easiest = select_easiest(distance, self.num_predicted)
        predicted_ids, distance = masked_ids.gather(1, easiest), distance.gather(1, easiest)
        keep = self.difficulty_flatten.keep_mask(distance, self._threshold())

        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, predicted_ids, keep).float()
        target = self.make_targets(patches, predicted_ids)
        error = patch_error(prediction, target)
        loss = self._loss(error, distance, keep)
        kept = torch.ones_like(error) if keep is None else keep.float()
        metrics = {"reconstruction": weighted_mean(error.detach(), kept), "decoded_patches": kept.sum(dim=1).mean()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, predicted_ids, metrics)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Predict all masked patches, including the hardest, on which the decoder was not trained."""
        patches = self.patchify(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, masked_ids)
        return self.make_reconstruction(patches, prediction[:, None], visible_ids[:, None], masked_ids[:, None])

    def _threshold(self) -> float | torch.Tensor | None:
        """Return the threshold in pixels. Table 6 (b) raises it to beta or, without beta, beyond every patch."""
        beta = self.difficulty_flatten.beta
        if self.scheduler != "schedule":
            return beta
        start, progress = SCHEDULE_START_BETA * self.patch_size, self.progress / 1e6
        return start / (1 - progress) if beta is None else start + (beta - start) * progress

    def _loss(self, error: torch.Tensor, distance: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        if self.scheduler == "flatten":
            return difficulty_flatten_loss(error, distance, self.difficulty_flatten.gamma, keep)
        weight = torch.ones_like(error)
        if self.scheduler == "normalize":
            weight = self.interval_weights.float()[interval_index(distance, self.patch_size)]
        return weighted_mean(error, weight if keep is None else weight * keep)


def interval_index(distance: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Map difficulties to the intervals of Table 6 (c). The paper gives none; ours are 1/4 patch wide."""
    return (distance * 4 / patch_size).clamp(max=NUM_INTERVALS - 1).long()


def compute_interval_weights(grid: int, num_visible: int, difficulty_flatten: DifficultyFlatten) -> torch.Tensor:
    """Compute the weights of Table 6 (c) from random masks with a fixed seed: float32 (NUM_INTERVALS,).

    A weight is the number of masked patches in an interval at MAE's mask ratio divided by that with
    `num_visible` visible patches; 1 if the latter is 0.
    """
    settings, counts = difficulty_flatten, []
    for visible in (max(1, int(grid * grid * (1 - REFERENCE_MASK_RATIO))), num_visible):
        distance = sample_difficulties(
            grid, visible, settings.patch_size, settings.metric, settings.exact, settings.num_nearest
        )
        index = interval_index(distance, settings.patch_size).flatten()
        counts.append(torch.bincount(index, minlength=NUM_INTERVALS).float())
    reference, actual = counts
    return torch.where(actual > 0, reference / actual, 1.0)
