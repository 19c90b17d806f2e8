"""iRPE, relative positions as a contextual product on the keys, as LoMaR uses it.

"Rethinking and Improving Relative Position Encoding for Vision Transformer", Wu et al., ICCV 2021, Eq. 18
(the piecewise index) and the product method, with LoMaR's settings: shared over heads, ratio 1.9, one bucket
of its own for the class token. As in LoMaR's code the query is not scaled before it meets the encoding.
"""

import math

import torch
from timm.layers import Attention
from torch import nn
from torch.nn import functional as F

RATIO = 1.9
ALPHA, BETA, GAMMA = 1 * RATIO, 2 * RATIO, 8 * RATIO


def piecewise_index(offset: int) -> int:
    """Eq. 18: a row or column offset, in patches, to an integer in [-3, 3]: exact nearby, logarithmic far
    away."""
    size = abs(offset)
    if size > ALPHA:
        size = ALPHA + math.log(size / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
        size = min(round(size), int(BETA))
    return int(math.copysign(size, offset))


NUM_BUCKETS = (2 * int(BETA) + 1) ** 2 + 1  # every pair of row and column index, and the class token's


def bucket_ids(window: int) -> torch.Tensor:
    """Which encoding joins each query (first) and key (second) of a window of window x window patches, row by
    row.

    int64 (1 + window^2, 1 + window^2), the class token first.
    """
    side = 2 * int(BETA) + 1
    index = [piecewise_index(offset) + int(BETA) for offset in range(1 - window, window)]
    axis = torch.arange(window)
    table = torch.tensor(index)[axis[:, None] - axis + window - 1]  # (query, key) along one axis
    product = table[:, None, :, None] * side + table[None, :, None, :]
    ids = torch.full((1 + window**2, 1 + window**2), NUM_BUCKETS - 1)
    ids[1:, 1:] = product.reshape(window**2, window**2)
    return ids


class ContextualProduct(nn.Module):
    """What a query adds to its attention to each key because of where the two stand.

    The encodings start at zero, as in the iRPE code, so attention starts without positions. They are of
    offsets, so they serve any square of patches: `window` is the one whose buckets are kept at hand.
    """

    def __init__(self, head_width: int, window: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_width, NUM_BUCKETS))  # 1: for all heads
        self.register_buffer("buckets", bucket_ids(window), persistent=False)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """query (N, heads, T, d) of a class token and a square of patches -> (N, heads, T, T)."""
        tokens = query.shape[2]
        buckets = self.buckets
        if tokens != len(buckets):
            buckets = bucket_ids(math.isqrt(tokens - 1)).to(query.device)
        # A dense product per query position costs what the product with all buckets would (window 7: 50 keys,
        # 50 buckets), and needs no gather per sample, whose backward is slow.
        encoding = self.lookup_table_weight[0][:, buckets]  # (d, T, T)
        return torch.einsum("nhid,dij->nhij", query, encoding)


class RelativeAttention(Attention):
    """timm's attention with iRPE on its keys."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, num_heads=heads, qkv_bias=True)
        self.rpe_k = ContextualProduct(width // heads, window)

    def forward(self, x: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=self.rpe_k(query))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
