"""MAE's decoder: a narrow transformer that predicts the pixels of selected patches.

It equals the official decoder in value but computes less. Attention does not depend on the order of its
tokens, so the encoded tokens come first and the mask tokens after them, not in raster order. In the first
block the mask token of a position is the same for every image, so it is projected once per batch. The last
block computes outputs of mask tokens only.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import LAYER_NORM_EPS, ROW_ALIGNMENT, make_block, run_block
from pipeline.models.encoder import init_weights_mae
from pipeline.models.sincos_position import sincos_2d


def additive_mask(keep: torch.Tensor, num_encoded: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the attention mask of encoded tokens, which are all kept, and of mask tokens, of which some are.

    Args:
        keep: bool (N, M).
        num_encoded: Tokens before the mask tokens.

    Returns:
        (N, 1, 1, num_encoded + M): 0 for tokens to attend to, else -inf. Rows are aligned in memory.
    """
    total = num_encoded + keep.shape[1]
    padded = F.pad(keep[:, None, None, :], (num_encoded, -total % ROW_ALIGNMENT), value=True)
    return torch.where(padded, 0.0, float("-inf")).to(dtype)[..., :total]


class Decoder(nn.Module):
    """Transformer with a linear head that predicts P*P*3 pixels per patch; `grid` patches along a side.

    Without `has_mask_token`, the encoder processes the mask tokens. `num_outputs` replaces P*P*3.
    """

    pos_embed: torch.Tensor

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        activation_checkpointing: bool = False,
        has_mask_token: bool = True,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if has_mask_token else None
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList([make_block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(width, num_outputs or patch_size**2 * 3)
        self.apply(init_weights_mae)

    def forward(
        self, encoded: torch.Tensor, visible_ids: torch.Tensor, mask_ids: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the patches at `mask_ids`.

        Args:
            encoded: (N, 1 + V, D), the encoder's output, class token first.
            visible_ids: int64 (N, V), positions of the encoded patches.
            mask_ids: int64 (N, M), positions to predict. Without a mask token, these must be the last M of
                `visible_ids`.
            keep: bool (N, M). No token attends to a mask token that is not kept, so the predictions of the
                kept ones are the same as if the others were absent. Predictions of the others are undefined.

        Returns:
            (N, M, P*P*3).
        """
        tokens = self.embed(encoded)
        pos_embed = self.pos_embed[0].to(tokens.dtype)  # the engine casts parameters, not buffers
        positions = torch.cat([pos_embed[:1].expand(len(tokens), 1, -1), pos_embed[1:][visible_ids]], dim=1)
        tokens = tokens + positions
        attn_mask = None if keep is None else additive_mask(keep, encoded.shape[1], tokens.dtype)
        mask_inputs = () if self.mask_token is None else (self.mask_token[0] + pos_embed[1:], mask_ids)
        for index, block in enumerate(self.blocks):
            num_queries = mask_ids.shape[1] if index == len(self.blocks) - 1 else None
            tokens = run_block(
                block,
                tokens,
                attn_mask,
                num_queries,
                *mask_inputs,
                activation_checkpointing=self.activation_checkpointing,
            )
            mask_inputs = ()  # the first block appended the mask tokens to `tokens`
        return self.pred(self.norm(tokens))
