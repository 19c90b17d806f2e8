"""BEiT's encoder: a ViT with mask tokens, layer scale and a relative position bias shared by all blocks.

"BEiT: BERT Pre-Training of Image Transformers", Bao et al., ICLR 2022. Parameters have the names and shapes of timm's
Beit with `use_shared_rel_pos_bias`, and `mask_token` in addition.
"""

from typing import Any

import torch
from timm.models.beit import Block, gen_relative_position_index
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import LAYER_NORM_EPS, run_block
from pipeline.models.drop_path import DropPath
from pipeline.models.encoder import PatchEmbed, PatchProjection

INIT_STD = 0.02


class RelativePositionBias(nn.Module):
    """Additive attention bias of each (query, key) pair of the class token and the patches of a square image."""

    index: torch.Tensor

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        offsets = (2 * grid - 1) ** 2 + 3  # 3: from, to and between class tokens
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads))
        index = gen_relative_position_index((grid, grid))
        # Memory-efficient attention needs rows of a multiple of 8 numbers; the added columns are never read.
        self.num_tokens = len(index)
        self.register_buffer("index", F.pad(index, (0, -self.num_tokens % 8)), persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the bias (1, heads, 1 + L, 1 + L), the class token first."""
        # F.embedding accumulates its gradient in float32.
        bias = F.embedding(self.index, self.relative_position_bias_table).permute(2, 0, 1).contiguous()
        return bias[None, ..., : self.num_tokens]


class BeitAttention(nn.Module):
    """Attention with an additive bias and learned biases of queries and values only, as BEiT's.

    Unlike timm's module, it has no buffer, which the engine would not cast to 16 bits, and it calls `qkv`, whose weight
    ZeRO-3 gathers only then.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend tokens (N, T, D) to each other, with a bias (1, heads, T, T)."""
        query, key, value = self.project(x).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=shared_rel_pos_bias)
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Return the queries, keys and values of tokens (N, T, D): (3, N, heads, T, D / heads)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return (self.qkv(x) + bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class BeitEncoder(nn.Module):
    """BEiT with a class token and no absolute positions; `grid` patches along a side."""

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        layer_scale: float,
        drop_path: float,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        self.rel_pos_bias = RelativePositionBias(grid, heads)
        self.blocks = nn.ModuleList()
        self.drop_paths: list[DropPath] = []
        for rate in torch.linspace(0, drop_path, depth, device="cpu").tolist():
            block: Any = Block(width, heads, qkv_bias=True, init_values=layer_scale)
            block.attn = BeitAttention(width, heads)
            block.norm1.eps = block.norm2.eps = LAYER_NORM_EPS
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
            self.drop_paths += [block.drop_path1, block.drop_path2]
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialize as BEiT's code: normal weights, of which those at the end of residual branches are scaled down."""
        for token in (self.cls_token, self.mask_token):
            nn.init.trunc_normal_(token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchProjection):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks: Any = self.blocks
        with torch.no_grad():
            for number, block in enumerate(blocks, start=1):
                for linear in (block.attn.proj, block.mlp.fc2):
                    linear.weight.div_((2 * number) ** 0.5)

    def forward(
        self, patches: torch.Tensor, masked: torch.Tensor | None = None, drop_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images of which some patches are replaced by the mask token.

        Args:
            patches: (B, L, P*P*3).
            masked: bool (B, L); None: no patch is masked.
            drop_noise: (B, len(drop_paths)) in [0, 1), for stochastic depth; None: no branch is dropped.

        Returns:
            (B, 1 + L, D), class token first.
        """
        for number, drop_path in enumerate(self.drop_paths):
            if drop_noise is None:
                drop_path.keep = None
            else:
                drop_path.draw(drop_noise[:, number])
        tokens = self.patch_embed(patches)
        if masked is not None:
            tokens = torch.where(masked[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        bias = self.rel_pos_bias()
        for block in self.blocks:
            tokens = run_block(block, tokens, bias, activation_checkpointing=self.activation_checkpointing)
        return self.norm(tokens)
