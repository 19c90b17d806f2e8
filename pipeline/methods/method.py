"""What every method is: a module from images and noise to a loss, and from images and noise to pictures.

Invariant: a method has no state but its weights. All randomness enters by the noise, nothing reads a file, a
rank or an engine, and no step waits for the device (no `.item()`, no shape that depends on values).
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import nn

from pipeline.losses import denormalize, normalize_targets, patchify
from pipeline.masking import as_mask
from pipeline.models.learner import TrainableModule


class MethodOutput(NamedTuple):
    """B images; M predicted positions; V visible ones. EMAE and LoMaR put their parts or windows, K, after B.

    A named tuple, because ZeRO-3 walks through a module's outputs and rebuilds them. Only the loss carries a
    gradient.
    """

    loss: torch.Tensor
    """float32 scalar: the mean over images of a per-image loss."""
    prediction: torch.Tensor
    """float32 (B, [K,] M, P*P*3), on the target's scale."""
    target: torch.Tensor
    """float32 (B, [K,] M, P*P*3): pixels, normalised per patch where the recipe says so."""
    visible_ids: torch.Tensor
    """int64 (B, [K,] V): positions that were seen, row by row from 0."""
    predicted_ids: torch.Tensor
    """int64 (B, [K,] M): positions of the predictions."""
    metrics: dict[str, torch.Tensor]
    """Parts of the loss and other figures, 0-d, float32, detached."""


class Reconstruction(NamedTuple):
    """What each of K views (1 for MAE) makes of the whole image of L patches."""

    visible: torch.Tensor
    """bool (B, K, L): what the view saw."""
    pixels: torch.Tensor
    """float32 (B, K, L, P*P*3), patches in `losses.patchify`'s order, on the scale of the input images. The
    input where visible, else the prediction; where targets are normalised, it is put back on the true patch's
    mean and variance."""


class Method(TrainableModule):
    encoder: nn.Module
    grid: int
    """Patches along a side of an image."""
    patch_size: int
    normalize_targets: bool

    @abstractmethod
    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """images (B, 3, H, W) float32, normalised by mean and std; noise (B, noise_size) float32."""

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of whole images: (B, 3, H, W) -> (B, 1 + L, D), the class token first."""
        patches = self.patches(images)
        ids = torch.arange(patches.shape[1], device=images.device).expand(patches.shape[:2])
        return self.encoder(patches, ids)

    @abstractmethod
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Every patch that a view did not see, predicted. Same arguments as forward; no gradient."""

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """`losses.patchify`; ValueError for images of another size than the model's."""
        side = self.grid * self.patch_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, {side}, {side})")
        return patchify(images, self.patch_size)

    def targets(self, patches: torch.Tensor) -> torch.Tensor:
        return normalize_targets(patches) if self.normalize_targets else patches

    def picture(
        self,
        patches: torch.Tensor,
        prediction: torch.Tensor,
        visible_ids: torch.Tensor,
        predicted_ids: torch.Tensor,
    ) -> Reconstruction:
        """patches (B, L, D), prediction (B, K, M, D), ids (B, K, V) and (B, K, M) -> Reconstruction."""
        batch, views, _, pixels = prediction.shape
        truth = patches[:, None].expand(batch, views, -1, pixels)
        index = predicted_ids[..., None].expand(-1, -1, -1, pixels)
        prediction = prediction.float()
        if self.normalize_targets:
            prediction = denormalize(prediction, truth.gather(2, index))
        visible = as_mask(visible_ids, patches.shape[1])
        return Reconstruction(
            visible, torch.where(visible[..., None], truth, truth.scatter(2, index, prediction))
        )
