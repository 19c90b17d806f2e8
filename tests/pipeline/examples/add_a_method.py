"""Add a method like SimMIM (Xie et al., CVPR 2022) and train it on random images."""

from typing import Literal

import torch
from pydantic import Field

from pipeline.masking import as_mask, gather_tokens, random_split
from pipeline.methods import Method, MethodOutput, build_method, register_method
from pipeline.methods.backbone import build_encoder
from pipeline.methods.targets import build_target
from pipeline.recipe import Recipe, method_options
from pipeline.recipe.loading import load


class SimmimOptions(method_options.Section):  # belongs in pipeline/recipe/method_options.py
    mask_ratio: float = Field(default=0.6, gt=0.0, lt=1.0)


class MethodSection(method_options.MethodSection):  # there, add "simmim" and the field instead
    name: Literal["simmim"]
    simmim: SimmimOptions = SimmimOptions()


class SimmimRecipe(Recipe):  # not needed there
    method: MethodSection


@register_method("simmim")
class SimMIM(Method):  # belongs in pipeline/methods/simmim.py, imported in pipeline/methods/__init__.py
    """Encode all patches, with a learned patch in place of masked ones, and predict these linearly."""

    def __init__(self, recipe: SimmimRecipe) -> None:
        super().__init__()
        self.grid, self.patch_size, self.noise_size = recipe.grid, recipe.model.patch_size, recipe.num_patches
        self.num_visible = int(recipe.num_patches * (1 - recipe.method.simmim.mask_ratio))
        self.encoder, self.target = build_encoder(recipe), build_target(recipe)
        self.head = torch.nn.Linear(recipe.model.size.width, self.target.width)
        self.mask_patch = torch.nn.Parameter(torch.zeros(self.patch_size**2 * 3))

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        patches = self.patchify(images)  # (B, L, P*P*3)
        visible_ids, masked_ids = random_split(noise, self.num_visible)  # (B, V), (B, M)
        inputs = torch.where(as_mask(masked_ids, patches.shape[1])[..., None], self.mask_patch, patches)
        tokens = self.encoder(inputs, self.all_ids(patches))  # (B, 1 + L, D), class token first
        prediction = self.head(gather_tokens(tokens, masked_ids + 1)).float()
        target = self.make_targets(patches, masked_ids)
        loss = (prediction - target).abs().mean(dim=(1, 2)).mean()
        return MethodOutput(loss, prediction.detach(), target, visible_ids, masked_ids, metrics={})


method = build_method(load(SimmimRecipe, "demo_emae", ["method.name=simmim"]))
optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=0.05), lr=1e-3)
images, noise = torch.randn(8, 3, 64, 64), torch.rand(8, method.noise_size)
for step in range(5):
    optimizer.zero_grad()
    loss = method(images, noise).loss
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.4f}")
