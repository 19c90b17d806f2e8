"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022.

https://arxiv.org/abs/2111.06377. Equal in value to the official code, github.com/facebookresearch/mae: the
same weights, images and noise give the same loss.
"""

import torch

from pipeline.losses import patch_error
from pipeline.masking import gather_tokens, random_split
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.method import Method, MethodOutput
from pipeline.methods.registry import register_method
from pipeline.recipe import Recipe


@register_method("mae")
class MAE(Method):
    """Encode `num_visible` random patches of an image and predict all the others."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, self.decoder = build_encoder(recipe), build_decoder(recipe)
        self.num_visible, self.normalize_targets = recipe.num_visible, recipe.method.normalize_targets
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = recipe.num_patches

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with V = num_visible and M = L - V."""
        patches = self.patchify(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, masked_ids).float()
        target = self.make_targets(patches, masked_ids)
        loss = patch_error(prediction, target).mean(dim=1).mean()
        metrics = {"reconstruction": loss.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, masked_ids, metrics)
