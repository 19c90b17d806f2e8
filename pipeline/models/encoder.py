"""Vision transformer that encodes any subset of an image's patches, weight-compatible with timm's.

Invariant: a parameter is used only inside the forward of the module that owns it. ZeRO-3 gathers parameters
module by module; anywhere else a parameter is empty.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import LAYER_NORM_EPS, make_block, run_block
from pipeline.models.sincos_position import sincos_2d


class PatchProjection(nn.Module):
    """Project flattened patches, (..., P*P*3) -> (..., D), with the weight (D, 3, P, P) of a convolution."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # A patch is ordered row, column, channel; the convolution's weight channel, row, column.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.bias)


class PatchEmbed(nn.Module):
    """Give the projection the name that it has in checkpoints, `patch_embed.proj`."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


def init_weights_mae(module: nn.Module) -> None:
    """Initialize one module's parameters as the official MAE code does; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PatchProjection):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        bound = 1 / math.sqrt(module.weight[0].numel())  # PyTorch's default for a convolution's bias
        nn.init.uniform_(module.bias, -bound, bound)
    for name in ("cls_token", "mask_token"):
        token = module._parameters.get(name)
        if token is not None:
            nn.init.normal_(token, std=0.02)


class Encoder(nn.Module):
    """ViT with a class token and fixed sine-cosine positions; `grid` patches along a side.

    With `has_mask_token` it can also process mask tokens, as in MAE's Table 1 (c).
    """

    pos_embed: torch.Tensor

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        activation_checkpointing: bool = False,
        has_mask_token: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if has_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        # Not persistent: recomputed with the model, because a bf16 checkpoint would round it.
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList([make_block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(init_weights_mae)

    def forward(self, patches: torch.Tensor, ids: torch.Tensor, mask_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Encode patches (N, V, P*P*3) at positions `ids` (N, V) -> (N, 1 + V, D), class token first.

        With `mask_ids` (N, M), also encode mask tokens at these positions -> (N, 1 + V + M, D).
        """
        tokens = self.patch_embed(patches)
        pos_embed = self.pos_embed.to(tokens.dtype)  # the engine casts parameters, not buffers
        tokens = tokens + pos_embed[0, 1:][ids]
        if mask_ids is not None:
            tokens = torch.cat([tokens, self.mask_token + pos_embed[0, 1:][mask_ids]], dim=1)
        cls_token = self.cls_token + pos_embed[:, :1]
        tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = run_block(block, tokens, activation_checkpointing=self.activation_checkpointing)
        return self.norm(tokens)
