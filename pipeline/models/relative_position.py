"""Relative position encoding on keys (iRPE, contextual product), with LoMaR's settings.

"Rethinking and Improving Relative Position Encoding for Vision Transformer", Wu et al., ICCV 2021, Eq. 18
and the product method. LoMaR's settings: shared over heads, ratio 1.9, a separate bucket for the class token.
As in LoMaR's code, the query is not scaled before the product with the encoding.
"""

import math

import torch
from timm.layers.attention import Attention
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import ROW_ALIGNMENT

RATIO = 1.9
ALPHA, BETA, GAMMA = 1 * RATIO, 2 * RATIO, 8 * RATIO


def piecewise_index(offset: int) -> int:
    """Map a row or column offset in patches to an index in [-3, 3] by Eq. 18: exact nearby, logarithmic far
    away."""
    size = abs(offset)
    if size > ALPHA:
        size = ALPHA + math.log(size / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
        size = min(round(size), int(BETA))
    return int(math.copysign(size, offset))


NUM_BUCKETS = (2 * int(BETA) + 1) ** 2 + 1  # pairs of row and column index, and one for the class token


def bucket_ids(window_size: int) -> torch.Tensor:
    """Compute the bucket of each (query, key) pair of a class token and the patches of a square window in
    raster order: int64 (1 + window_size^2, 1 + window_size^2)."""
    side = 2 * int(BETA) + 1
    index = [piecewise_index(offset) + int(BETA) for offset in range(1 - window_size, window_size)]
    axis = torch.arange(window_size)
    table = torch.tensor(index)[axis[:, None] - axis + window_size - 1]  # (query, key) along one axis
    product = table[:, None, :, None] * side + table[None, :, None, :]
    ids = torch.full((1 + window_size**2, 1 + window_size**2), NUM_BUCKETS - 1)
    ids[1:, 1:] = product.reshape(window_size**2, window_size**2)
    return ids


def one_hot_buckets(window_size: int) -> torch.Tensor:
    """Return `bucket_ids` in one-hot form: bool (NUM_BUCKETS, T, T'), with T' - T keys of no bucket for alignment."""
    ids = F.pad(bucket_ids(window_size), (0, -(1 + window_size**2) % ROW_ALIGNMENT), value=-1)
    return torch.arange(NUM_BUCKETS)[:, None, None] == ids


class ContextualProduct(nn.Module):
    """Product of each query with the learned encoding of its offset to each key, an additive attention bias.

    The encodings start at zero, as in the iRPE code. They belong to offsets, so they apply to a square of any
    size; the buckets of `window_size` are precomputed.
    """

    buckets: torch.Tensor

    def __init__(self, head_width: int, window_size: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_width, NUM_BUCKETS))  # 1: for all heads
        self.register_buffer("buckets", one_hot_buckets(window_size), persistent=False)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """Map queries (N, heads, T, d) of a class token and T - 1 patches of a square to (N, heads, T, T)."""
        tokens, buckets = query.shape[2], self.buckets
        if tokens != buckets.shape[1]:
            buckets = one_hot_buckets(math.isqrt(tokens - 1)).to(query.device)
        # The encoding of each (query, key) pair, (d, T, T'): a product, which selects exactly, because the backward
        # pass of an index adds to few rows from many places. T' is padded so that the bias has aligned rows.
        table = self.lookup_table_weight[0]
        encoding = (table @ buckets.flatten(1).to(table.dtype)).unflatten(1, buckets.shape[1:])
        # One dense product per query position: as many keys as buckets (50 for a 7 x 7 window), so it costs
        # no more than the product with all buckets.
        return torch.einsum("nhid,dij->nhij", query, encoding)[..., :tokens]


class RelativeAttention(Attention):
    """timm's attention with iRPE on the keys. The mask arguments of timm's interface are not supported."""

    def __init__(self, width: int, heads: int, window_size: int) -> None:
        super().__init__(width, num_heads=heads, qkv_bias=True)
        self.rpe_k = ContextualProduct(width // heads, window_size)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=self.rpe_k(query))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
