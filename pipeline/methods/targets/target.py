"""What a method predicts for each patch: a function of the image, with the error of a prediction.

Invariant: a target has no trained weights, and neither the truth nor the error synchronizes with the device.
"""

import math

import torch
from torch.nn import functional as F

from pipeline.losses import denormalize, normalize_targets, patch_error
from pipeline.masking import gather_tokens
from pipeline.methods.targets.hog import CELL, NUM_BINS, draw_hog, hog_features
from pipeline.methods.targets.pca import NUM_IMAGES, PatchPca
from pipeline.methods.targets.tokens import Tokenizer, draw_tokens
from pipeline.recipe import Recipe


class Target:
    """Prediction target of the patches of an image."""

    width: int
    """Numbers that a method predicts for a patch."""
    is_image: bool = True
    """Whether `to_pixels` approximates the image."""
    num_images: int = 0
    """Images of the shard set that `fit` needs; 0 if the target does not depend on the data set."""

    def fit(self, images: torch.Tensor) -> None:
        """Receive the first `num_images` images (N, 3, H, W) of the shard set, at every start of a run."""

    def to(self, device: torch.device) -> None:
        """Move what the target computes with to the device of the images."""

    def select(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute the truth at some patches.

        Args:
            patches: (B, L, P*P*3), all patches of square images.
            ids: int64 (B, [K,] M).

        Returns:
            (B, [K,] M, width), or classes int64 (B, [K,] M).
        """
        raise NotImplementedError

    def error(self, prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Compute the error of predictions (..., M, width): float32 (..., M); by default, the mean squared error."""
        return patch_error(prediction, truth)

    def draw(self, truth: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Draw the truth, as `to_pixels` draws predictions."""
        return self.to_pixels(truth, patches)

    def to_pixels(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Draw predictions (..., width) as patches (..., P*P*3); `patches` are the true ones, of the same shape."""
        raise NotImplementedError


class PixelTarget(Target):
    """Pixels of a patch, MAE's target; normalized per patch if `normalized`."""

    def __init__(self, patch_size: int, normalized: bool) -> None:
        self.width, self.normalized = patch_size**2 * 3, normalized

    def select(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        truth = gather_tokens(patches, ids.flatten(1))
        return (normalize_targets(truth) if self.normalized else truth).view(*ids.shape, -1)

    def to_pixels(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the predicted pixels; normalized ones get the true patch's mean and variance."""
        return denormalize(prediction, patches) if self.normalized else prediction


class PcaTarget(Target):
    """Principal components of a patch's pixels (MAE, Table 1 (d))."""

    num_images = NUM_IMAGES

    def __init__(self, patch_size: int, num_components: int) -> None:
        self.width, self.patch_size = num_components, patch_size
        self.pca = PatchPca(num_components, patch_size**2 * 3)

    def fit(self, images: torch.Tensor) -> None:
        self.pca.fit(images, self.patch_size)

    def to(self, device: torch.device) -> None:
        self.pca.to(device)

    def select(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.pca.project(gather_tokens(patches, ids.flatten(1))).view(*ids.shape, -1)

    def to_pixels(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the sum of the predicted components. Raises UserError if they are not known."""
        return self.pca.invert(prediction)


class HogTarget(Target):
    """Histograms of oriented gradients, MaskFeat's target."""

    is_image = False

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size
        self.width = 3 * NUM_BINS * (patch_size // CELL) ** 2

    def select(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        features = hog_features(_unpatchify(patches, self.patch_size), self.patch_size)
        return gather_tokens(features, ids.flatten(1)).view(*ids.shape, -1)

    def to_pixels(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Draw a line in each cell along every orientation, as bright as its bin."""
        return draw_hog(prediction, self.patch_size)


class TokenTarget(Target):
    """Visual tokens of a discrete VAE, BEiT's target, with cross-entropy."""

    is_image = False

    def __init__(self, recipe: Recipe) -> None:
        self.patch_size = recipe.model.patch_size
        self.tokenizer = Tokenizer(recipe.data.mean, recipe.data.std, recipe.grid)
        self.width = recipe.method.target.vocabulary

    def to(self, device: torch.device) -> None:
        self.tokenizer.to(device)

    def select(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        tokens = self.tokenizer.encode(_unpatchify(patches, self.patch_size))
        return tokens.gather(1, ids.flatten(1)).view(ids.shape)

    def error(self, prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy."""
        loss = F.cross_entropy(prediction.float().flatten(0, -2), truth.flatten(), reduction="none")
        return loss.view(truth.shape)

    def to_pixels(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Fill a patch with the color of its most probable token."""
        return draw_tokens(prediction.argmax(dim=-1), self.patch_size)

    def draw(self, truth: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return draw_tokens(truth, self.patch_size)


def build_target(recipe: Recipe) -> Target:
    """Build the recipe's target. Tokens still need `tokenizer.codebook`, principal components `fit`."""
    target, patch_size = recipe.method.target, recipe.model.patch_size
    if target.name == "pca":
        return PcaTarget(patch_size, target.components)
    if target.name == "hog":
        return HogTarget(patch_size)
    if target.name == "tokens":
        return TokenTarget(recipe)
    return PixelTarget(patch_size, normalized=target.name == "normalized_pixels")


def _unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Invert `patchify` for square images: (B, L, P*P*3) -> (B, 3, H, H)."""
    grid = math.isqrt(patches.shape[1])
    pixels = patches.unflatten(1, (grid, grid)).unflatten(3, (patch_size, patch_size, 3))
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid * patch_size, grid * patch_size)
