"""Attention of the class token: the last layer's heads, and rollout through all layers.

Attention is recomputed from each block's queries and keys, because the fused kernel does not return it.
"""

import psutil
import torch
from PIL import Image
from timm.layers.attention import Attention
from torch import nn
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.models.beit_encoder import BeitAttention
from pipeline.models.relative_position import RelativeAttention
from pipeline.pictures.canvas import Column, Scale, heatmap, render_grid
from pipeline.pictures.images import to_pixels
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder

MAX_HEADS = 6
"""Heads with a column of their own."""
COPIES = 2
"""Attention matrices of one layer in memory at once: before and after the softmax."""


def plot_attention(encoder: ImageEncoder, data: DataSection, batch: torch.Tensor) -> tuple[Image.Image, str]:
    """Draw attention maps of images (B, 3, S, S) of the encoder's size; return picture and a summary."""
    _check_memory(encoder)
    images = tqdm(batch.split(1), "attention", delay=5, leave=False, disable=None)
    heads, rollout = (torch.cat(maps) for maps in zip(*(class_attention(encoder, one) for one in images), strict=True))
    grid = encoder.image_size // encoder.patch_size
    maps = {"rollout": rollout, "last layer, mean": heads.mean(dim=1)}
    maps |= {f"head {h + 1}": heads[:, h] for h in range(min(heads.shape[1], MAX_HEADS))}
    side = batch.shape[-1]
    columns = [Column("original", to_pixels(batch, data))]
    for title, values in maps.items():
        values = values / values.quantile(0.99, dim=1, keepdim=True)
        columns.append(Column(title, heatmap(values.reshape(-1, grid, grid).numpy(), 0, 1, side)))
    caption = (
        f"{encoder.name}, {side} px, {grid} x {grid} patches. Attention of the class token to each patch: "
        "rollout through all layers (mean of the heads, half of each layer is the residual), and "
        f"{len(maps) - 2} of the {heads.shape[1]} heads of the last layer. Each map has its own scale."
    )
    scale = Scale("attention", "0", "99th percentile")
    return render_grid(columns, caption, [scale]), f"{heads.shape[1]} heads, {grid} x {grid} patches"


def _check_memory(encoder: ImageEncoder) -> None:
    tokens = (encoder.image_size // encoder.patch_size) ** 2 + 1
    needed = 4 * tokens**2 * (COPIES * encoder.heads + 3)
    if needed > psutil.virtual_memory().available:
        raise UserError(
            f"--kind attention: {encoder.heads} heads over {tokens} tokens need {needed / 2**30:.0f} GiB of "
            "memory; reduce --tiles"
        )


@torch.inference_mode()
def class_attention(encoder: ImageEncoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the class token's attention to the patches of images (B, 3, S, S).

    Returns:
        The last layer's attention (B, heads, L), and attention rollout (Abnar and Zuidema 2020), (B, L).
    """
    inputs: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # tokens, and BEiT's bias
    attentions = [a for a in encoder.vit.blocks.modules() if isinstance(a, Attention | BeitAttention)]

    def record(_: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args[0], kwargs.get("shared_rel_pos_bias")))

    hooks = [a.register_forward_pre_hook(record, with_kwargs=True) for a in attentions]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    rollout = torch.eye(inputs[0][0].shape[1]).expand(len(images), -1, -1)
    weights = torch.empty(0)
    for attention, (tokens, bias) in zip(attentions, inputs, strict=True):
        weights = attention_weights(attention, tokens, bias)
        rollout = (weights.mean(dim=1) + torch.eye(weights.shape[-1])) / 2 @ rollout
    return weights[:, :, 0, 1:], rollout[:, 0, 1:]


def attention_weights(
    attention: Attention | BeitAttention, tokens: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Recompute a block's attention for its normalized input (B, T, D): (B, heads, T, T), rows sum to one."""
    if isinstance(attention, BeitAttention):
        query, key, _ = attention.project(tokens)
    else:
        query, key, _ = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if isinstance(attention, RelativeAttention):
        scores = scores + attention.rpe_k(query)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)
