"""MAE's decoder: a narrow transformer that predicts pixels at the positions it is asked for.

Equal in value to the official one, without the work that can be spared. Attention does not depend on the
order of its tokens, so nothing is put back into raster order: the encoded tokens come first, the asked
positions after them. In the first block an asked position is the same in every image, so it is projected once
for the batch. After the last block's attention only the asked positions are wanted.
"""

import torch
from torch import nn

from pipeline.models.block import LAYER_NORM_EPS, make_block, run_block
from pipeline.models.encoder import initialize_like_mae
from pipeline.models.position import sincos_2d


class Decoder(nn.Module):
    """`encoder_width` -> `width`, `depth` blocks, then a linear head onto a patch's P*P*3 pixels."""

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList([make_block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(width, patch_size**2 * 3)
        self.apply(initialize_like_mae)

    def forward(
        self,
        encoded: torch.Tensor,
        visible_ids: torch.Tensor,
        mask_ids: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """encoded (N, 1 + V, D) of the patches at visible_ids (N, V) -> pixels at asked_ids (N, M): (N, M,
        P*P*3).

        keep (N, M) bool: positions that are not kept are hidden from every token's attention, so the kept
        ones come out as if the others had never been fed; the prediction at the others means nothing.
        """
        tokens = self.embed(encoded)
        pos_embed = self.pos_embed[0].to(tokens.dtype)  # the engine casts parameters, not buffers
        positions = torch.cat([pos_embed[:1].expand(len(tokens), 1, -1), pos_embed[1:][visible_ids]], dim=1)
        tokens = tokens + positions
        attn_mask = None
        if keep is not None:
            always = keep.new_ones(len(keep), encoded.shape[1])
            attn_mask = torch.cat([always, keep], dim=1)[:, None, None, :]
        num_asked = mask_ids.shape[1]
        predicted_ids = (self.mask_token[0] + pos_embed[1:], mask_ids)
        for index, block in enumerate(self.blocks):
            wanted = num_asked if index == len(self.blocks) - 1 else None
            tokens = run_block(
                block, tokens, attn_mask, wanted, *predicted_ids, checkpointing=self.checkpointing
            )
            predicted_ids = ()  # from here on they are tokens like the others
        return self.pred(self.norm(tokens))
