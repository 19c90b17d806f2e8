"""The transformer block of encoder and decoder: timm's weights, without the work that can be spared."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-6  # MAE's; torch's own default is 1e-5


class TransformerBlock(Block):
    """Pre-norm attention and MLP; tokens may come as a table, and part of the result may be left out."""

    def forward(
        self,
        tokens: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        num_wanted: int | None = None,
        table: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens (N, T, D) -> (N, T, D), or the last `num_wanted` alone, the others being only attended to.

        With a table (L, D) and ids (N, M) the rows that the ids name follow the tokens, T + M in all; what a
        row needs before attention is then computed once for all images.
        """
        count, given, width = tokens.shape
        if table is None:
            qkv = self.attn.qkv(self.norm1(tokens))
        else:
            rows = self.attn.qkv(self.norm1(torch.cat([tokens.flatten(0, 1), table])))
            own, shared = rows.split([count * given, len(table)])
            # An embedding, because its backward adds up in float32, and (not compiled) in a fixed order.
            qkv = torch.cat([own.view(count, given, -1), F.embedding(ids, shared)], dim=1)
            tokens = torch.cat([tokens, F.embedding(ids, table)], dim=1)
        heads = self.attn.num_heads
        # Taken apart where they lie: moved to the front, as in timm, they cost the backward pass a copy.
        query, key, value = qkv.unflatten(2, (3, heads, width // heads)).unbind(2)
        if num_wanted is not None:
            query, tokens = query[:, -num_wanted:], tokens[:, -num_wanted:]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attn_mask
        )
        tokens = tokens + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


def make_block(width: int, heads: int, kind: type[Block] = TransformerBlock) -> Block:
    """A block with MAE's settings."""
    return kind(width, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS))


def run_block(block: nn.Module, *inputs: object, checkpointing: bool) -> torch.Tensor:
    """One block. With `checkpointing` its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
