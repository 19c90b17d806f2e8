"""LoMaR's encoder: a ViT on one window of patches with mask tokens and relative positions only."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

from pipeline.models.block import LAYER_NORM_EPS, make_block, run_block
from pipeline.models.encoder import PatchEmbed, init_weights_mae
from pipeline.models.relative_position import RelativeAttention


class WindowEncoder(nn.Module):
    """ViT whose attention is confined to a square window of `window_size` x `window_size` patches."""

    def __init__(
        self,
        *,
        window_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.activation_checkpointing = activation_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        self.blocks = nn.ModuleList([make_block(width, heads, Block) for _ in range(depth)])
        for block in self.blocks:
            block.attn = RelativeAttention(width, heads, window_size)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(init_weights_mae)

    def forward(self, patches: torch.Tensor, ids: torch.Tensor, num_patches: int | None = None) -> torch.Tensor:
        """Encode windows of which some patches are visible; the others are mask tokens.

        Args:
            patches: (N, V, P*P*3), the visible patches.
            ids: int64 (N, V), their positions in the window.
            num_patches: L, patches of a window, a square number; default window_size^2.

        Returns:
            (N, 1 + L, D), class token first.
        """
        num_patches = num_patches or self.window_size**2
        visible = self.patch_embed(patches)
        batch, _, width = visible.shape
        tokens = self.mask_token.to(visible.dtype).expand(batch, num_patches, width)
        tokens = tokens.scatter(1, ids[:, :, None].expand(-1, -1, width), visible)
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = run_block(block, tokens, activation_checkpointing=self.activation_checkpointing)
        return self.norm(tokens)
