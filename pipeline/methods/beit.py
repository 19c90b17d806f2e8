"""BEiT: "BEiT: BERT Pre-Training of Image Transformers", Bao et al., ICLR 2022.

https://arxiv.org/abs/2106.08254. Blocks of patches are replaced by a mask token in the input of the encoder; one linear
layer predicts the visual tokens of the masked patches. Equal in value to transformers' BeitForMaskedImageModeling for
the same weights, images, masks and tokens. The paper masks at most 40 % of the patches; here it is always the same
number, so that all images count equally and shapes are static.
"""

import torch
from torch import nn

from pipeline.masking import as_mask, block_noise_size, block_split, gather_tokens
from pipeline.methods.method import Method, MethodOutput
from pipeline.methods.registry import register_method
from pipeline.methods.targets import build_target
from pipeline.models.beit_encoder import INIT_STD, BeitEncoder
from pipeline.recipe import Recipe


@register_method("beit")
class Beit(Method):
    """Mask blocks of patches and predict the target of each masked patch."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = recipe.method.beit
        self.encoder = BeitEncoder(
            grid=recipe.grid,
            patch_size=recipe.model.patch_size,
            **recipe.model.size._asdict(),
            layer_scale=options.layer_scale,
            drop_path=options.drop_path,
            activation_checkpointing=recipe.engine.activation_checkpointing,
        )
        self.target = build_target(recipe)
        self.head = nn.Linear(recipe.model.size.width, self.target.width)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.num_visible = recipe.num_visible
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self._noise_sizes = [block_noise_size(recipe.grid), len(self.encoder.drop_paths)]
        self.noise_size = sum(self._noise_sizes)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with M = L - num_visible; all patches pass through the encoder."""
        mask_noise, drop_noise = noise.split(self._noise_sizes, dim=1)
        visible_ids, masked_ids = block_split(mask_noise, self.grid, self.num_visible)
        patches = self.patchify(images)
        masked = as_mask(masked_ids, patches.shape[1])
        encoded = self.encoder(patches, masked, drop_noise if self.training else None)
        prediction = self.head(gather_tokens(encoded, masked_ids + 1)).float()  # + 1: the class token
        truth = self.target.select(patches, masked_ids)
        loss = self.target.error(prediction, truth).mean(dim=1).mean()
        metrics = {"reconstruction": loss.detach()}
        return MethodOutput(loss, prediction.detach(), truth, visible_ids, masked_ids, metrics)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode unmasked images (B, 3, H, W) -> (B, 1 + L, D), class token first."""
        return self.encoder(self.patchify(images))
