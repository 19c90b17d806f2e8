"""ViTDet's backbone: a plain ViT with window attention, and a simple feature pyramid on its last map.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (2022), with the settings of detectron2's
projects/ViTDet. The ViT is timm's VisionTransformerSAM, which computes the same function.

Invariant: no random generator is used in the forward pass; `DropPath` modules are told which images to drop.
"""

from functools import partial

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn import functional as F

from pipeline.models.block import LAYER_NORM_EPS
from pipeline.models.drop_path import DropPath

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Of the pyramid's maps, relative to the ViT's. One more has half the resolution of the last."""


def build_vitdet(
    width: int, depth: int, heads: int, patch_size: int, image_size: int, window_size: int, drop_path: float
) -> VisionTransformerSAM:
    """Build ViTDet's ViT with random weights, which maps images (B, 3, S, S) to (B, D, S / P, S / P).

    The last block of each quarter of the depth attends globally, the others in windows of `window_size` patches.

    Args:
        drop_path: Drop rate of the last block, decreasing linearly to 0 at the first.
    """
    vit = VisionTransformerSAM(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),  # pyright: ignore[reportArgumentType]
        use_rel_pos=True,
        window_size=window_size,
        global_attn_indexes=global_blocks(depth),
        num_classes=0,
        neck_chans=0,
    )
    vit.neck = nn.Identity()  # ViTDet has no norm after the last block
    vit.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for number, block in enumerate(vit.blocks):
        rate = drop_path * number / max(depth - 1, 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return vit


def global_blocks(depth: int) -> tuple[int, ...]:
    """Return the last block of each quarter: 2, 5, 8, 11 of 12; 5, 11, 17, 23 of 24; 7, 15, 23, 31 of 32."""
    return tuple(sorted({max(0, round(depth * quarter / 4) - 1) for quarter in (1, 2, 3, 4)}))


def vitdet_state_dict(vit: VisionTransformer, patch_size: int, image_size: int) -> dict[str, torch.Tensor]:
    """Convert the weights of a plain ViT with absolute positions to those of `build_vitdet`.

    Positions are interpolated to the new grid without the class token's, the patch embedding is resized, and class
    token and final norm are dropped. Relative positions, which a plain ViT lacks, are not in the result.
    """
    state = vit.state_dict()
    kept = {name: tensor for name, tensor in state.items() if name.startswith(("patch_embed.", "blocks."))}
    weight = "patch_embed.proj.weight"
    if kept[weight].shape[-1] != patch_size:
        kept[weight] = resample_patch_embed(kept[weight], [patch_size] * 2)
    positions = state["pos_embed"][:, 1:]
    grid = round(positions.shape[1] ** 0.5)
    positions = positions.view(1, grid, grid, -1)
    side = image_size // patch_size
    kept["pos_embed"] = resample_abs_pos_embed_nhwc(positions, [side, side], antialias=False)
    return kept


class SimpleFeaturePyramid(nn.Module):
    """Maps the ViT's last map (B, D, H, W) to five maps of `width` channels, at strides P / 4 to 4 P."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        upsampling = {
            4.0: (_upsample(embed_dim, half), LayerNorm2d(half), nn.GELU(), _upsample(half, quarter)),
            2.0: (_upsample(embed_dim, half),),
            1.0: (),
            0.5: (nn.MaxPool2d(2),),
        }
        channels = {4.0: quarter, 2.0: half, 1.0: embed_dim, 0.5: embed_dim}
        self.stages = nn.ModuleList(
            nn.Sequential(
                *upsampling[scale],
                nn.Conv2d(channels[scale], width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for scale in SCALES
        )

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        maps = [stage(features) for stage in self.stages]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def _upsample(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)
