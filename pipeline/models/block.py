"""Transformer block of the encoder and the decoder, weight-compatible with timm's."""

from functools import partial
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-6  # MAE's value; PyTorch's default is 1e-5
ROW_ALIGNMENT = 8
"""Fused attention kernels need rows of a mask that start at multiples of this many elements, and copy other masks."""


class TransformerBlock(Block):
    """Pre-norm attention and MLP with two optional savings for the decoder.

    Mask tokens can be given as one table for the whole batch, and outputs that are not needed can be skipped.
    Neither changes a value.
    """

    attn: Attention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (these inputs replace is_causal)
        self,
        tokens: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        mask_tokens: torch.Tensor | None = None,
        mask_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            tokens: (N, T, D).
            attn_mask: Added to the attention logits; broadcastable to (N, heads, queries, keys).
            num_queries: Compute only the last `num_queries` outputs. The other tokens are only attended to.
            mask_tokens: (L, D), the mask token of every position. The ones that `mask_ids` selects are
                appended to `tokens`; each is normalized and projected once for the whole batch.
            mask_ids: int64 (N, M), positions of the mask tokens of each image.

        Returns:
            (N, T + M, D) or (N, num_queries, D).
        """
        batch, length, width = tokens.shape
        if mask_tokens is None or mask_ids is None:
            qkv = self.attn.qkv(self.norm1(tokens))
        else:
            rows = self.attn.qkv(self.norm1(torch.cat([tokens.flatten(0, 1), mask_tokens])))
            token_qkv, mask_qkv = rows.split([batch * length, len(mask_tokens)])
            # F.embedding accumulates its gradient in float32 and, unless compiled, in a fixed order.
            qkv = torch.cat([token_qkv.view(batch, length, -1), F.embedding(mask_ids, mask_qkv)], dim=1)
            tokens = torch.cat([tokens, F.embedding(mask_ids, mask_tokens)], dim=1)
        heads = self.attn.num_heads
        # Unbound without timm's permutation, which costs a copy in the backward pass.
        query, key, value = qkv.unflatten(2, (3, heads, width // heads)).unbind(2)
        if num_queries is not None:
            query, tokens = query[:, -num_queries:], tokens[:, -num_queries:]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attn_mask
        )
        tokens = tokens + self.attn.proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


def make_block(width: int, heads: int, block_class: type[Block] = TransformerBlock) -> Block:
    """Create a block with MAE's settings."""
    norm_layer = cast(type[nn.Module], partial(nn.LayerNorm, eps=LAYER_NORM_EPS))
    return block_class(width, heads, qkv_bias=True, norm_layer=norm_layer)


def run_block(block: nn.Module, *inputs: object, activation_checkpointing: bool) -> torch.Tensor:
    """Run a block; with activation checkpointing, its backward pass recomputes the activations."""
    if activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
