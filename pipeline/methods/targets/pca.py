"""Principal components of patches as reconstruction targets: Table 1 (d) of MAE (He et al., CVPR 2022).

Invariant: the components are a function of the images that they were fitted to. They are no weights: every start of a
run fits them to the same images again.
"""

import torch

from pipeline.errors import UserError
from pipeline.losses import patchify

NUM_IMAGES = 256
"""Images to fit the components to, which have 50,000 patches at 224 px and patch size 16."""


class PatchPca:
    """The `num_components` directions of largest variance of flattened patches of `num_values` values.

    Until `fit` is called, targets are NaN. The tensors are no buffers, because the engine would round those to 16 bits.
    """

    def __init__(self, num_components: int, num_values: int) -> None:
        self.is_fitted = False
        self._mean = torch.full((num_values,), torch.nan)
        self._components = torch.full((num_values, num_components), torch.nan)

    def fit(self, images: torch.Tensor, patch_size: int) -> None:
        """Compute the components from images (N, 3, H, W) in float64; the largest entry of each is positive."""
        patches = patchify(images, patch_size).flatten(0, 1).double()
        mean = patches.mean(dim=0)
        centered = patches - mean
        _, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))  # in ascending order of variance
        components = vectors.flip(1)[:, : self._components.shape[1]]
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        self._mean, self._components = mean.float(), (components * largest.sign()).float()
        self.is_fitted = True

    def to(self, device: torch.device) -> None:
        """Move the components."""
        self._mean, self._components = self._mean.to(device), self._components.to(device)

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the coefficients of patches: (..., P*P*3) -> float32 (..., num_components)."""
        return (patches.float() - self._mean) @ self._components

    def invert(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the patches with these coefficients: (..., num_components) -> float32 (..., P*P*3).

        Raises:
            UserError: If the components are not known.
        """
        if not self.is_fitted:
            raise UserError(
                "method.target.name: pca: the components are known only while training; reconstructions are in "
                "RUN/reconstructions"
            )
        return coefficients.float() @ self._components.T + self._mean
