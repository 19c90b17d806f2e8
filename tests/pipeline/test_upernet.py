"""The heads and the backbone of segmentation are those of transformers (BEiT, UperNet) and timm."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import BeitConfig, UperNetConfig
from transformers.models.beit.modeling_beit import BeitBackbone
from transformers.models.upernet.modeling_upernet import UperNetFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TransformersHead

from pipeline.models.relative_bias import add_relative_bias
from pipeline.models.upernet import FCNHead, FeaturePyramid, UperNetHead

WIDTH, CHANNELS, CLASSES, DEPTH, HEADS, PATCH, SIZE = 32, 24, 7, 4, 2, 8, 64
CONFIG = UperNetConfig(
    backbone_config=BeitConfig(),
    hidden_size=CHANNELS,
    num_labels=CLASSES,
    auxiliary_channels=16,
    auxiliary_in_channels=WIDTH,
)


def features(seed: int = 0, side: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, WIDTH, side // factor, side // factor, generator=generator) for factor in (1, 2, 4, 9)]


def randomize(module: nn.Module) -> nn.Module:
    """Replace all weights and running statistics by random numbers."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
    return module


@pytest.mark.parametrize("training", [False, True])
def test_the_head_equals_that_of_transformers(training):
    theirs = randomize(TransformersHead(CONFIG, [WIDTH] * 4)).train(training)
    ours = UperNetHead([WIDTH] * 4, CHANNELS, CLASSES, nn.BatchNorm2d).train(training)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(features()), theirs(features()), atol=1e-5, rtol=1e-5)


def test_the_auxiliary_head_equals_that_of_transformers():
    theirs = randomize(UperNetFCNHead(CONFIG, [WIDTH] * 4)).eval()
    ours = FCNHead(WIDTH, 16, CLASSES, nn.BatchNorm2d).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(features()[2]), theirs(features()), atol=1e-5, rtol=1e-5)


def test_dropout_scales_the_channels_before_the_classifier():
    head = UperNetHead([WIDTH] * 4, CHANNELS, CLASSES, nn.BatchNorm2d).eval()
    nn.init.normal_(head.classifier.bias)
    dropped = head(features(), torch.tensor([[1.0] * CHANNELS, [0.0] * CHANNELS]))
    torch.testing.assert_close(dropped[0], head(features())[0])
    torch.testing.assert_close(dropped[1], head.classifier.bias[:, None, None].expand_as(dropped[1]))


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, mlp_ratio=2
    )
    vit.norm = nn.Identity()
    return randomize(vit).eval()


def test_a_zero_bias_leaves_timms_features_unchanged():
    vit, images = small_vit(), torch.randn(2, 3, SIZE, SIZE)
    before = vit.forward_intermediates(images, indices=DEPTH, intermediates_only=True)
    add_relative_bias(vit)
    assert sum("relative_position_bias_table" in name for name, _ in vit.named_parameters()) == DEPTH
    after = vit.forward_intermediates(images, indices=DEPTH, intermediates_only=True)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def beit_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename timm's keys, with ours of relative positions, to those of transformers' BEiT.

    BEiT's keys have no bias, which the softmax over keys ignores.
    """
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    renamed = {
        "beit.embeddings.cls_token": state["cls_token"],
        "beit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        key = f"beit.embeddings.patch_embeddings.projection.{kind}"
        renamed[key] = state[f"patch_embed.proj.{kind}"]
    for block in range(DEPTH):
        ours, theirs = f"blocks.{block}", f"beit.layers.{block}"
        for kind in ("weight", "bias"):
            for name, other in names.items():
                renamed[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{name}.{kind}"]
            for part, tensor in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{theirs}.attention.{part}_proj.{kind}"] = tensor
        del renamed[f"{theirs}.attention.k_proj.bias"]
        for number in (1, 2):
            renamed[f"{theirs}.lambda_{number}"] = state[f"{ours}.ls{number}.gamma"]
        table = "relative_position_bias_table"
        renamed[f"{theirs}.relative_position_bias.{table}"] = state[f"{ours}.attn.rel_pos.{table}"]
    return renamed


def test_the_backbone_equals_beits_with_relative_positions():
    vit = small_vit()
    add_relative_bias(vit)
    randomize(vit)
    pyramid = randomize(FeaturePyramid(WIDTH, nn.BatchNorm2d)).eval()
    config = BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=True,
        layer_scale_init_value=1.0,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=True,
        add_fpn=True,
    )
    beit = BeitBackbone(config).eval()
    parts = {"up4.0": "fpn1.conv_transpose1", "up4.1": "fpn1.normalization", "up4.3": "fpn1.conv_transpose2"}
    parts["up2"] = "fpn2"
    state = beit_state(vit.state_dict())
    for key, tensor in pyramid.state_dict().items():
        part, _, kind = key.rpartition(".")
        state[f"fpn.{parts[part]}.{kind}"] = tensor
    result = beit.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all("mask_token" in name for name in result.missing_keys), result
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        ours = pyramid(vit.forward_intermediates(images, indices=DEPTH, intermediates_only=True))
        theirs = beit(images).feature_maps
    for our_map, their_map in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_map, their_map, atol=1e-5, rtol=1e-4)
