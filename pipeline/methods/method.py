"""Base class of the masked-image-modeling methods and their outputs.

Invariant: a method has no state but its weights. All randomness enters through the noise, nothing reads a
file, a rank or an engine, and no step synchronizes with the device (no `.item()`, no data-dependent shape).
"""

from typing import NamedTuple

import torch
from torch import nn

from pipeline.losses import patchify
from pipeline.masking import as_mask
from pipeline.methods.targets import Target
from pipeline.models.trainable_module import TrainableModule


class MethodOutput(NamedTuple):
    """Output of a method's forward pass for B images with V visible and M predicted patches.

    Methods with several views per image (EMAE's parts, LoMaR's windows) have a dimension K after B. Only the
    loss carries a gradient. A named tuple, because ZeRO-3 traverses and rebuilds a module's outputs.
    """

    loss: torch.Tensor
    """float32 scalar, the mean over images of a per-image loss."""
    prediction: torch.Tensor
    """float32 (B, [K,] M, W), W numbers per patch: on the scale of the target, or the logits of its classes."""
    target: torch.Tensor
    """float32 (B, [K,] M, W), or classes int64 (B, [K,] M)."""
    visible_ids: torch.Tensor
    """int64 (B, [K,] V), positions of the visible patches in raster order of the image."""
    predicted_ids: torch.Tensor
    """int64 (B, [K,] M), positions of the predicted patches."""
    metrics: dict[str, torch.Tensor]
    """Parts of the loss and other values to log; 0-d, float32, detached."""


class Reconstruction(NamedTuple):
    """Reconstructions of B images of L patches by K views each (1 for MAE)."""

    visible: torch.Tensor
    """bool (B, K, L), the patches that the view saw."""
    pixels: torch.Tensor
    """float32 (B, K, L, P*P*3), in `patchify`'s order and on the scale of the input images: the input where
    visible, else the prediction, denormalized with the true patch's statistics if targets are normalized."""


class Method(TrainableModule):
    """Base class of the methods.

    The constructor of a subclass takes a recipe and sets the attributes below and `noise_size`. A subclass
    implements `forward`, and `reconstruct` if its forward does not predict all masked patches of one view.
    """

    encoder: nn.Module
    grid: int
    """Patches along one side of the image."""
    patch_size: int
    """P, in pixels."""
    target: Target
    """What is predicted."""

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Compute the loss of a batch.

        Args:
            images: float32 (B, 3, H, W), normalized by mean and standard deviation.
            noise: float32 (B, noise_size), uniform in [0, 1).
        """
        raise NotImplementedError

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode unmasked images (B, 3, H, W) -> (B, 1 + L, D), class token first."""
        patches = self.patchify(images)
        return self.encoder(patches, self.all_ids(patches))

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Predict every patch that a view did not see, without gradient. Takes the arguments of `forward`."""
        output = self(images, noise)
        view = (x[:, None] for x in (output.prediction, output.visible_ids, output.predicted_ids))
        return self.make_reconstruction(self.patchify(images), *view)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cut images into patches (B, L, P*P*3).

        Raises:
            ValueError: If the images do not have the model's size.
        """
        side = self.grid * self.patch_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images: shape {tuple(images.shape)} is not (B, 3, {side}, {side})")
        return patchify(images, self.patch_size)

    def all_ids(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the positions 0 ... L - 1 of patches (B, L, D): int64 (B, L)."""
        return torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])

    def make_targets(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute the truth at ids (B, [K,] M) of patches (B, L, D); see `Target.select`."""
        return self.target.select(patches, ids)

    @torch.no_grad()
    def draw_targets(self, images: torch.Tensor) -> torch.Tensor:
        """Draw the truth of all patches of images (B, 3, H, W): float32 (B, L, P*P*3)."""
        patches = self.patchify(images)
        return self.target.draw(self.make_targets(patches, self.all_ids(patches)), patches)

    def make_reconstruction(
        self, patches: torch.Tensor, prediction: torch.Tensor, visible_ids: torch.Tensor, predicted_ids: torch.Tensor
    ) -> Reconstruction:
        """Put predictions (B, K, M, W), drawn as pixels, at predicted_ids (B, K, M) into the input patches (B, L, D),
        except at visible_ids (B, K, V)."""
        truth = patches[:, None].expand(-1, predicted_ids.shape[1], -1, -1)
        index = predicted_ids[..., None].expand(-1, -1, -1, patches.shape[2])
        prediction = self.target.to_pixels(prediction.float(), truth.gather(2, index))
        visible = as_mask(visible_ids, patches.shape[1])
        filled = truth.scatter(2, index, prediction)
        return Reconstruction(visible, torch.where(visible[..., None], truth, filled))
