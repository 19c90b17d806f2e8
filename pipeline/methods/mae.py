"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022.

https://arxiv.org/abs/2111.06377. Equal in value to the official code, github.com/facebookresearch/mae: the
same weights, images and noise give the same loss. The ablations of Table 1 (c), (d) and (f) are options.
"""

import torch

from pipeline.masking import block_noise_size, block_split, gather_tokens, grid_split, random_split
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.method import Method, MethodOutput
from pipeline.methods.registry import register_method
from pipeline.methods.targets import build_target
from pipeline.recipe import Recipe


@register_method("mae")
class MAE(Method):
    """Encode `num_visible` patches of an image and predict all the others."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = recipe.method.mae
        self.mask_tokens_in_encoder, self.mask_sampling = options.mask_tokens_in_encoder, options.mask_sampling
        self.target = build_target(recipe)
        self.encoder = build_encoder(recipe, has_mask_token=self.mask_tokens_in_encoder)
        self.decoder = build_decoder(recipe, not self.mask_tokens_in_encoder, self.target.width)
        self.num_visible = recipe.num_visible
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = block_noise_size(self.grid) if self.mask_sampling == "block" else recipe.num_patches

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
        loss = self.target.error(prediction, target).mean(dim=1).mean()
        metrics = {"reconstruction": loss.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, masked_ids, metrics)

    def _split(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mask_sampling == "block":
            return block_split(noise, self.grid, self.num_visible)
        if self.mask_sampling == "grid":
            return grid_split(noise, self.grid)
        return random_split(noise, self.num_visible)
