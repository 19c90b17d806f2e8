"""Relative position bias of BEiT: a learned number per head and offset, added to the attention logits.

"BEiT: BERT Pre-Training of Image Transformers", Bao et al., ICLR 2022, https://arxiv.org/abs/2106.08254. MAE's
segmentation on ADE20K adds it to absolute positions, one table per block. It starts at zero, so the model starts as
the pre-trained one.
"""

from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.pos_embed_rel import RelPosBias
from timm.models.vision_transformer import VisionTransformer
from torch import nn


class BiasedAttention(Attention):
    """timm's attention of a class token and grid x grid patches, with a relative position bias."""

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__(width, num_heads=heads, qkv_bias=True)
        self.rel_pos = RelPosBias((grid, grid), heads, prefix_tokens=1)
        nn.init.zeros_(self.rel_pos.relative_position_bias_table)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        # Through its forward, because ZeRO-3 gathers a parameter only there.
        bias = self.rel_pos(x.new_zeros(()))
        return super().forward(x, bias if attn_mask is None else bias + attn_mask, is_causal)


def add_relative_bias(vit: VisionTransformer) -> None:
    """Give each block of a ViT a relative position bias of zeros and a layer scale of ones; its output is unchanged."""
    grid = vit.patch_embed.grid_size[0]
    for block in vit.blocks:
        trained = cast(Attention, block.attn)
        block.attn = BiasedAttention(vit.embed_dim, trained.num_heads, grid)
        block.attn.load_state_dict(trained.state_dict(), strict=False)
        block.ls1, block.ls2 = (LayerScale(vit.embed_dim, init_values=1.0) for _ in range(2))
