"""timm's Beit with a shared relative position bias, into which `BeitEncoder`'s weights fit.

"BEiT: BERT Pre-Training of Image Transformers", Bao et al., ICLR 2022. It has the interface of timm's
VisionTransformer.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import nn

from pipeline.models.beit_encoder import BeitAttention, RelativePositionBias

BIAS_TABLE = "rel_pos_bias.relative_position_bias_table"
"""timm's key of the table (offsets, heads)."""
NUM_CLASS_TOKEN_ROWS = 3


class _SharedBiasBeit(Beit):
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of layer-wise learning rates, without the shared bias, which gets the head's rate.

        BEiT's code does the same; in timm's Beit the bias has the lowest rate.
        """
        return {"stem": r"^cls_token|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def build_timm_beit(
    *, image_size: int, patch_size: int, width: int, depth: int, heads: int, mlp_ratio: float, norm_eps: float
) -> Beit:
    """Build the model without a head. Unlike timm's, its attention can be partitioned by ZeRO-3."""
    model: Any = _SharedBiasBeit(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),  # pyright: ignore[reportArgumentType]
        init_values=1.0,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
    )
    model.rel_pos_bias = RelativePositionBias(image_size // patch_size, heads)
    for block in model.blocks:
        block.attn = BeitAttention(width, heads)
    return model


def bias_grid(table: torch.Tensor) -> int:
    """Return the patches along a side of the images of a table (offsets, heads), or 0 if it is no such table."""
    if table.ndim != 2:
        return 0
    side = math.isqrt(max(0, len(table) - NUM_CLASS_TOKEN_ROWS))
    return (side + 1) // 2 if side % 2 and side**2 == len(table) - NUM_CLASS_TOKEN_ROWS else 0


def resize_bias_table(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Interpolate a table for images of grid x grid patches, as timm does; rows of the class token stay."""
    rows = (2 * grid - 1) ** 2 + NUM_CLASS_TOKEN_ROWS
    return resize_rel_pos_bias_table(table, (grid, grid), (rows, table.shape[1]))
