"""Efficient MAE: "Efficient MAE towards Large-Scale Vision Transformers", Han et al., WACV 2024.

MAE at a higher mask ratio (0.85). The Difficulty-Flatten Loss weighs each masked patch by d^-gamma, where d
is its difficulty, P2Dist (Eq. 1, Algorithm 1, Eq. 2); decoder masking drops patches with d > beta before the
decoder (Section 4.2). The ablations of Tables 5 (`metric`) and 6 (`scheduler`) are options.

Layout. The threshold keeps another number of patches in every image. The decoder gets the same number of
slots for each: the easiest `prediction_ratio` x L masked patches, the threshold inside them as an attention
mask. Shapes are static, an image's loss depends on no other image, and the loss equals the one of really
dropping the patches. The number of slots is ours, not the paper's: where a mask leaves more patches under the
threshold than there are slots, the hardest of them go (docs/methods.md says how many). With
`prediction_ratio` null every masked patch has a slot and the threshold alone decides.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from pipeline.difficulty import Metric, difficulty
from pipeline.losses import difficulty_flatten_loss, patch_error, weighted_mean
from pipeline.masking import as_mask, gather_tokens, random_split
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.recipe.method_options import EASIEST_BETA

Scheduler = Literal["flatten", "threshold", "schedule", "normalize"]

REFERENCE_MASK_RATIO = 0.75  # Table 6 (c) compares with MAE's


@dataclass(frozen=True)
class DifficultyFlatten:
    """The loss's and the decoder's view of difficulty; also for the methods that borrow it.

    gamma >= 0: 0 weighs all patches alike. beta: pixels, None for no threshold. `exact`, `k`: P2Dist's.
    """

    patch_size: int
    gamma: float = 0.6
    beta: float | None = 26.0
    metric: Metric = "p2dist"
    exact: bool = False
    k: int = 8

    def difficulty(self, visible_ids: torch.Tensor, grid: int) -> torch.Tensor:
        """visible_ids (N, V) on a grid x grid image -> difficulty of every patch, float32 (N, L)."""
        visible = as_mask(visible_ids, grid * grid).view(-1, grid, grid)
        return difficulty(visible, self.patch_size, self.metric, self.exact, self.k).flatten(1)

    def keep(self, distance: torch.Tensor, beta: float | torch.Tensor | None) -> torch.Tensor | None:
        """Which patches stay under the threshold; None where nothing can be dropped, for the faster
        attention."""
        if beta is not None:
            return distance <= beta
        return distance.isfinite() if self.metric in ("neighbors_3x3", "inverse_distance_5x5") else None


def easiest(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices into distance (..., M) of the `count` smallest, in their order: int64 (..., count).

    Equal distances may differ in their last bits; rounded to 1/1024, they rank the same on every device.
    """
    return (distance * 1024).round().argsort(dim=-1, stable=True)[..., :count]


class EfficientMAE(Method):
    """`num_visible` of L patches are encoded, `num_predicted` of the others are slots of the decoder."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        num_visible: int,
        num_predicted: int,
        flattening: DifficultyFlatten,
        scheduler: Scheduler,
        normalize_targets: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_visible, self.num_predicted = num_visible, num_predicted
        self.flattening, self.scheduler = flattening, scheduler
        self.normalize_targets = normalize_targets
        self.grid, self.patch_size = encoder.grid, encoder.patch_size
        self.noise_size = self.grid**2
        if scheduler == "schedule":
            # In millionths and whole: cast to bf16 with the module, a fraction would be rounded.
            self.register_buffer("progress", torch.zeros((), dtype=torch.int64), persistent=False)
        if scheduler == "normalize":
            weights = torch.empty(NUM_INTERVALS)  # on the caller's default device; on meta nothing is counted
            if not weights.is_meta:
                weights.copy_(interval_ratios(encoder.grid, num_visible, flattening))
            self.register_buffer("interval_weights", weights, persistent=False)

    def set_training_progress(self, done: float) -> None:
        if self.scheduler == "schedule":
            self.progress.fill_(round(done * 1e6))

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """MethodOutput with M = num_predicted, from easy to hard; a prediction beyond the threshold means
        nothing."""
        patches = self.patches(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        distance = self.flattening.difficulty(visible_ids, self.encoder.grid).gather(1, masked_ids)
        slots = easiest(distance, self.num_predicted)
        mask_ids, distance = masked_ids.gather(1, slots), distance.gather(1, slots)
        keep = self.flattening.keep(distance, self._beta())

        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, mask_ids, keep).float()
        target = self.targets(gather_tokens(patches, mask_ids))
        error = patch_error(prediction, target)
        loss = self._loss(error, distance, keep)
        kept = torch.ones_like(error) if keep is None else keep.float()
        metrics = {
            "reconstruction": weighted_mean(error.detach(), kept),
            "decoded_patches": kept.sum(dim=1).mean(),
        }
        return MethodOutput(loss, prediction.detach(), target, visible_ids, mask_ids, metrics)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """All masked patches at once, the hardest included, although the decoder was not trained on those."""
        patches = self.patches(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, masked_ids)
        return self.picture(patches, prediction[:, None], visible_ids[:, None], masked_ids[:, None])

    def _beta(self) -> float | torch.Tensor | None:
        """The threshold in pixels. Table 6 (b) grows it, to beta or, without one, beyond every patch."""
        beta = self.flattening.beta
        if self.scheduler != "schedule":
            return beta
        first, done = EASIEST_BETA * self.patch_size, self.progress / 1e6
        return first / (1 - done) if beta is None else first + (beta - first) * done

    def _loss(self, error: torch.Tensor, distance: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        if self.scheduler == "flatten":
            return difficulty_flatten_loss(error, distance, self.flattening.gamma, keep)
        weight = torch.ones_like(error)
        if self.scheduler == "normalize":
            weight = self.interval_weights.float()[interval(distance, self.patch_size)]
        return weighted_mean(error, weight if keep is None else weight * keep)


NUM_INTERVALS = 16


def interval(distance: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Table 6 (c): which of 16 intervals a difficulty falls into. The paper gives none; ours are a quarter
    patch."""
    return (distance * 4 / patch_size).clamp(max=NUM_INTERVALS - 1).long()


@lru_cache
def interval_ratios(
    grid: int, num_visible: int, flattening: DifficultyFlatten, masks: int = 256
) -> torch.Tensor:
    """Table 6 (c): per interval, masked patches at mask ratio 0.75 over masked patches at this one: float32
    (16,); 1 where this one has none.

    Counted once on random masks from a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, NUM_INTERVALS, device="cpu")
    with torch.device("cpu"):
        for noise in torch.rand(masks, grid * grid, generator=generator).split(64):
            for row, visible in enumerate((int(grid * grid * (1 - REFERENCE_MASK_RATIO)), num_visible)):
                visible_ids, masked_ids = random_split(noise, max(1, visible))
                distance = flattening.difficulty(visible_ids, grid).gather(1, masked_ids)
                found = interval(distance, flattening.patch_size).flatten()
                counts[row] += torch.bincount(found, minlength=NUM_INTERVALS)
    reference, own = counts
    return torch.where(own > 0, reference / own, 1.0)
