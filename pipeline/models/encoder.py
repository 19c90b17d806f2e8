"""The encoder: a vision transformer over the patches it is given, weight-compatible with timm's
VisionTransformer.

Invariant: a parameter is used only inside the forward of the module that owns it. ZeRO-3 gathers parameters
module by module and would hand out an empty one otherwise.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import LAYER_NORM_EPS, make_block, run_block
from pipeline.models.position import sincos_2d


class PatchProjection(nn.Module):
    """ViT's patch embedding for patches that are already cut out: (..., P*P*3) -> (..., D).

    The weight has the shape of the strided convolution it stands for, (D, 3, P, P), so checkpoints fit.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # Patches hold row, column, channel; the convolution's weight holds channel, row, column.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.bias)


class PatchEmbed(nn.Module):
    """Gives the projection its name in checkpoints, `patch_embed.proj`."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


def initialize_like_mae(module: nn.Module) -> None:
    """MAE's initialisation of one module's own parameters; for `nn.Module.apply`.

    Linear weights xavier-uniform with zero biases, the patch projection xavier-uniform on its flattened
    weight, tokens normal with standard deviation 0.02. Layer norms start at one and zero, as torch makes
    them. One thing differs: the projection's bias starts at zero too, where the official code leaves it to
    torch's default for convolutions.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PatchProjection):
        nn.init.xavier_uniform_(module.weight.flatten(1))
    for name in ("cls_token", "mask_token"):
        token = module._parameters.get(name)
        if token is not None:
            nn.init.normal_(token, std=0.02)


class Encoder(nn.Module):
    """A ViT with a class token and fixed positions that encodes any subset of an image's patches.

    `grid`: patches along one side of the image.
    """

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.patch_size, self.width = grid, patch_size, width
        self.checkpointing = checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        # Fixed, so a buffer, and made anew with the model: a checkpoint in bf16 would only round it.
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList([make_block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(initialize_like_mae)

    def forward(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """patches (N, V, P*P*3) that stand at positions ids (N, V) -> (N, 1 + V, D), the class token
        first."""
        tokens = self.patch_embed(patches)
        pos_embed = self.pos_embed.to(tokens.dtype)  # the engine casts parameters, not buffers
        tokens = tokens + pos_embed[0, 1:][ids]
        cls_token = self.cls_token + pos_embed[:, :1]
        tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = run_block(block, tokens, checkpointing=self.checkpointing)
        return self.norm(tokens)
