"""Where the class token looks: attention of the last layer's heads, and rollout through all layers.

Attention is computed anew from each block's queries and keys, as the fused kernel inside keeps none.
"""

import psutil
import torch
from PIL import Image
from timm.layers import Attention
from torch import nn
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.models.relative_position import RelativeAttention
from pipeline.pictures.canvas import Column, Scale, heat, render_grid
from pipeline.pictures.images import to_pixels
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder

MOST_HEADS = 6
"""Shown one by one."""
COPIES = 2
"""Of one layer's attention that are held at once: before and after the softmax."""


def plot_attention(encoder: ImageEncoder, data: DataSection, batch: torch.Tensor) -> tuple[Image.Image, str]:
    """Attention maps for photographs (B, 3, S, S) of the encoder's image size; and how many, in words."""
    _check_memory(encoder)
    each = [class_attention(encoder, one) for one in tqdm(batch.split(1), "attention", delay=5, leave=False)]
    heads, rollout = (torch.cat(maps) for maps in zip(*each, strict=True))
    grid = encoder.image_size // encoder.patch_size
    maps = {"rollout": rollout, "last layer, mean": heads.mean(dim=1)}
    maps |= {f"head {h + 1}": heads[:, h] for h in range(min(heads.shape[1], MOST_HEADS))}
    side = batch.shape[-1]
    columns = [Column("original", to_pixels(batch, data))]
    for title, values in maps.items():
        values = values / values.quantile(0.99, dim=1, keepdim=True)
        columns.append(Column(title, heat(values.reshape(-1, grid, grid).numpy(), 0, 1, side)))
    caption = (
        f"{encoder.name}, {side} px, {grid} x {grid} patches. Attention of the class token to each patch: "
        "rolled out through all layers (heads averaged, half of each layer the residual), and of the last "
        f"layer's heads, {len(maps) - 2} of {heads.shape[1]} one by one. Each map has its own scale."
    )
    scale = Scale("attention", "0", "99th percentile")
    return render_grid(columns, caption, [scale]), f"{heads.shape[1]} heads, {grid} x {grid} patches"


def _check_memory(encoder: ImageEncoder) -> None:
    tokens = (encoder.image_size // encoder.patch_size) ** 2 + 1
    needed = 4 * tokens**2 * (COPIES * encoder.heads + 3)
    if needed > psutil.virtual_memory().available:
        raise UserError(
            f"--kind attention: the weights of {encoder.heads} heads between {tokens} tokens need "
            f"{needed / 2**30:.0f} GiB of memory; take fewer --tiles"
        )


@torch.inference_mode()
def class_attention(encoder: ImageEncoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """images (B, 3, S, S) -> the last layer's attention of the class token to the patches, (B, heads, L), and
    attention rollout's (Abnar and Zuidema 2020), (B, L)."""
    inputs: list[torch.Tensor] = []
    attentions: list[nn.Module] = [block.attn for block in encoder.vit.blocks]
    hooks = [a.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for a in attentions]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    flow = torch.eye(inputs[0].shape[1]).expand(len(images), -1, -1)
    for attention, tokens in zip(attentions, inputs, strict=True):
        weights = attention_weights(attention, tokens)
        mixed = (weights.mean(dim=1) + torch.eye(weights.shape[-1])) / 2
        flow = mixed @ flow
    return weights[:, :, 0, 1:], flow[:, 0, 1:]


def attention_weights(attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """What a block's attention does with its normalised input (B, T, D): weights (B, heads, T, T) that add up
    to one over the last."""
    heads = attention.num_heads
    query, key, _ = attention.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if isinstance(attention, RelativeAttention):
        scores = scores + attention.rpe_k(query)
    return scores.softmax(dim=-1)
