"""LoMaR's encoder: a ViT on one window of patches, mask tokens included, with relative positions only."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

from pipeline.models.block import LAYER_NORM_EPS, make_block, run_block
from pipeline.models.encoder import PatchEmbed, initialize_like_mae
from pipeline.models.relative_position import RelativeAttention


class WindowEncoder(nn.Module):
    """`window`: patches along one side of a window. Attention never leaves it."""

    def __init__(
        self, *, window: int, patch_size: int, width: int, depth: int, heads: int, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.window, self.patch_size = window, patch_size
        self.checkpointing = checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        self.blocks = nn.ModuleList([make_block(width, heads, Block) for _ in range(depth)])
        for block in self.blocks:
            block.attn = RelativeAttention(width, heads, window)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(initialize_like_mae)

    def forward(self, patches: torch.Tensor, ids: torch.Tensor, places: int | None = None) -> torch.Tensor:
        """patches (N, V, P*P*3) that stand at ids (N, V) of their windows -> (N, 1 + places, D), class token
        first.

        places: patches of a window, a square number; None: window^2. All that are not given hold the mask
        token.
        """
        places = places or self.window**2
        seen = self.patch_embed(patches)
        count, _, width = seen.shape
        tokens = self.mask_token.to(seen.dtype).expand(count, places, width)
        tokens = tokens.scatter(1, ids[:, :, None].expand(-1, -1, width), seen)
        tokens = torch.cat([self.cls_token.expand(count, -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = run_block(block, tokens, checkpointing=self.checkpointing)
        return self.norm(tokens)
