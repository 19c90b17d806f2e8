"""ViTDet's backbone and pyramid: the function of transformers' VitDetBackbone, and the published shapes and sizes."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close
from transformers import VitDetBackbone, VitDetConfig

from pipeline.models.vitdet import SimpleFeaturePyramid, build_vitdet, global_blocks, vitdet_state_dict
from pipeline.recipe.sections import VIT_SIZES
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.detector import build_detector

WIDTH, DEPTH, HEADS, PATCH, WINDOW, TRAINED = 32, 4, 2, 16, 14, 224
PUBLISHED_MILLIONS = {"vitb16": 111, "vitl16": 331, "vith14": 662}
"""Parameters of Mask R-CNN on ViT-B, L and H: ViTDet's paper, Table 6."""


def plain_vit(patch_size=PATCH):
    torch.manual_seed(0)
    return VisionTransformer(TRAINED, patch_size, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0)


def converted(vit, image_size, blocks=DEPTH):
    """ViTDet's backbone with the weights of a plain ViT, and relative positions that are not zero."""
    ours = build_vitdet(WIDTH, blocks, HEADS, PATCH, image_size, WINDOW, drop_path=0.0)
    missing, unexpected = ours.load_state_dict(vitdet_state_dict(vit, PATCH, image_size), strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} == {"rel_pos_h", "rel_pos_w"}
    for name in missing:
        torch.nn.init.normal_(ours.get_parameter(name), std=0.5)
    return ours.eval()


def reference(ours, vit, image_size, window_blocks):
    """transformers' backbone with the same weights; it interpolates the plain ViT's positions itself."""
    config = VitDetConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=image_size,
        pretrain_image_size=TRAINED,
        patch_size=PATCH,
        window_size=WINDOW,
        window_block_indices=window_blocks,
        use_relative_position_embeddings=True,
    )
    state = {"embeddings.position_embeddings": vit.pos_embed.detach()}
    for name, tensor in ours.state_dict().items():
        if name.startswith("blocks."):
            state["encoder.layer." + name.removeprefix("blocks.").replace(".attn.", ".attention.")] = tensor
        elif name.startswith("patch_embed."):
            state[name.replace("patch_embed.proj", "embeddings.projection")] = tensor
    model = VitDetBackbone(config).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("image_size", [224, 256, 448, 1024])  # 14, 16, 28 and 64 patches: padded are 16 and 64
@pytest.mark.parametrize("num_global", [1, 4])
def test_the_backbone_is_transformers(image_size, num_global, monkeypatch):
    kept = global_blocks(DEPTH)[-num_global:]
    monkeypatch.setattr("pipeline.models.vitdet.global_blocks", lambda depth: kept)
    vit = plain_vit()
    ours = converted(vit, image_size)
    theirs = reference(ours, vit, image_size, [block for block in range(DEPTH) if block not in kept])
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        assert_close(ours(images), theirs(images).feature_maps[0], atol=1e-5, rtol=1e-5)


def test_global_attention_is_in_the_published_blocks():
    assert [global_blocks(depth) for depth in (12, 24, 32)] == [(2, 5, 8, 11), (5, 11, 17, 23), (7, 15, 23, 31)]
    vit = build_vitdet(WIDTH, 12, HEADS, PATCH, 64, WINDOW, 0.0)
    assert [number for number, block in enumerate(vit.blocks) if not block.window_size] == [2, 5, 8, 11]


def test_patches_of_14_are_resized_to_16():
    vit = plain_vit(patch_size=14)
    state = vitdet_state_dict(vit, PATCH, 256)
    assert state["patch_embed.proj.weight"].shape == (WIDTH, 3, 16, 16) and state["pos_embed"].shape == (
        1,
        16,
        16,
        WIDTH,
    )
    gradient = torch.linspace(-1, 1, 14)  # a patch that varies slowly gives the same token at both sizes
    small = (gradient[:, None] + 0.5 * gradient).expand(1, 3, 14, 14)
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")
    with torch.no_grad():
        expected = vit.patch_embed.proj(small).flatten()
        actual = torch.nn.functional.conv2d(
            large, state["patch_embed.proj.weight"], vit.patch_embed.proj.bias
        ).flatten()
    assert (actual - expected).norm() < 0.1 * expected.norm()


def test_drop_path_drops_whole_images_also_in_windows():
    vit = build_vitdet(WIDTH, DEPTH, HEADS, PATCH, 256, WINDOW, drop_path=0.5)
    images = torch.randn(3, 3, 256, 256)
    for block in vit.blocks:
        for module in (block.drop_path1, block.drop_path2):
            module.rate = 0.5
            module.draw(torch.tensor([0.1, 0.9, 0.4]))  # images 0 and 2 skip every block
    with torch.no_grad():
        features = vit(images)
        embedded = (vit.patch_embed(images) + vit.pos_embed).permute(0, 3, 1, 2)
    assert_close(features[[0, 2]], embedded[[0, 2]])
    assert not torch.allclose(features[1], embedded[1], atol=0.1)


def test_the_pyramid_has_the_published_strides():
    with torch.device("meta"):
        maps = SimpleFeaturePyramid(WIDTH, 256)(torch.empty(2, WIDTH, 64, 64))  # of 1024 px
    assert [tuple(level.shape) for level in maps] == [(2, 256, side, side) for side in (256, 128, 64, 32, 16)]


@pytest.mark.parametrize("model", PUBLISHED_MILLIONS)
def test_the_number_of_parameters_is_the_published_one(model):
    recipe = load_finetune_recipe(f"detect_{model}", "W")
    assert recipe.data.image_size == 1024
    with torch.device("meta"):
        detector = build_detector(*VIT_SIZES[recipe.detector.encoder], num_classes=80, recipe=recipe)
    # detectron2 stores the positions of 224 px with the class token's, and interpolates them in every forward pass.
    positions = detector.vit.pos_embed.numel() - (14**2 + 1) * detector.vit.embed_dim
    millions = (sum(p.numel() for p in detector.parameters()) - positions) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[model], abs=1)
