"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022.

https://arxiv.org/abs/2111.06377. Equal in value to the official code, github.com/facebookresearch/mae: the
same weights, images and noise give the same loss. The ablations of Table 1 (c), (d) and (f) are options.
"""

import torch

from pipeline.losses import patch_error
from pipeline.masking import block_noise_size, block_split, gather_tokens, grid_split, random_split
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.methods.pca_targets import NUM_IMAGES, PatchPca
from pipeline.methods.registry import register_method
from pipeline.recipe import Recipe


@register_method("mae")
class MAE(Method):
    """Encode `num_visible` patches of an image and predict all the others."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = recipe.method.mae
        self.mask_tokens_in_encoder, self.mask_sampling = options.mask_tokens_in_encoder, options.mask_sampling
        self.encoder = build_encoder(recipe, has_mask_token=self.mask_tokens_in_encoder)
        self.decoder = build_decoder(recipe, not self.mask_tokens_in_encoder, options.pca_targets)
        self.num_visible, self.normalize_targets = recipe.num_visible, recipe.method.normalize_targets
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = block_noise_size(self.grid) if self.mask_sampling == "block" else recipe.num_patches
        self.pca: PatchPca | None = None
        if options.pca_targets:
            self.pca = PatchPca(options.pca_targets, 3 * self.patch_size**2)
            self.num_target_images = NUM_IMAGES

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with V = num_visible and M = L - V."""
        patches = self.patchify(images)
        visible_ids, masked_ids = self._split(noise)
        visible = gather_tokens(patches, visible_ids)
        if self.mask_tokens_in_encoder:
            encoded = self.encoder(visible, visible_ids, masked_ids)
            encoded_ids = torch.cat([visible_ids, masked_ids], dim=1)
        else:
            encoded, encoded_ids = self.encoder(visible, visible_ids), visible_ids
        prediction = self.decoder(encoded, encoded_ids, masked_ids).float()
        target = self.make_targets(patches, masked_ids)
        loss = patch_error(prediction, target).mean(dim=1).mean()
        metrics = {"reconstruction": loss.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, masked_ids, metrics)

    def fit_targets(self, images: torch.Tensor) -> None:
        if self.pca:
            self.pca.fit(images, self.patch_size)

    def make_targets(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        targets = super().make_targets(patches, ids)
        return self.pca.project(targets) if self.pca else targets

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        output = self(images, noise)
        prediction = self.pca.invert(output.prediction) if self.pca else output.prediction
        view = (x[:, None] for x in (prediction, output.visible_ids, output.predicted_ids))
        return self.make_reconstruction(self.patchify(images), *view)

    def _split(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mask_sampling == "block":
            return block_split(noise, self.grid, self.num_visible)
        if self.mask_sampling == "grid":
            return grid_split(noise, self.grid)
        return random_split(noise, self.num_visible)
