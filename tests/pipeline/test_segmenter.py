"""The segmentation model: size, learning rates, loss, and what its randomness affects."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from pipeline.data.label_maps import IGNORED
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.segmentation import SegmentationTask
from pipeline.tasks.segmenter import Segmenter, feature_blocks

SIDE, CLASSES = 32, 5


def recipe(*overrides: str, name: str = "segment_tiny"):
    settings = [f"data.image_size={SIDE}", "segmenter.channels=16", "segmenter.auxiliary_channels=16"]
    return load_finetune_recipe(name, "random:demo_emae", [*(settings if name == "segment_tiny" else ()), *overrides])


def make_segmenter(*overrides: str) -> Segmenter:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    return Segmenter(vit, CLASSES, recipe(*overrides))


def batch(count: int = 3, seed: int = 0) -> tuple[torch.Tensor, list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, CLASSES, (count, SIDE, SIDE), generator=generator).to(torch.uint8)
    labels[:, :4] = IGNORED
    return images, [{"labels": each, "extent": torch.tensor([SIDE, SIDE])} for each in labels]


def neutral_noise(segmenter: Segmenter, count: int) -> torch.Tensor:
    """Return noise with which nothing is distorted or dropped."""
    return torch.full((count, segmenter.noise_size), 0.99)


def test_feature_blocks_are_the_published_ones():
    assert feature_blocks(12) == [4, 6, 8, 12] and feature_blocks(24) == [8, 12, 16, 24]
    assert feature_blocks(4) == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "width", "depth", "heads", "millions"), [("segment_vitb16", 768, 12, 12, 163.9)])
def test_the_number_of_parameters_is_that_of_the_reproduction(name, width, depth, heads, millions):
    with torch.device("meta"):
        vit = VisionTransformer(img_size=512, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
        segmenter = Segmenter(vit, 150, recipe(name=name))
    assert sum(p.numel() for p in segmenter.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_learning_rates_decay_from_block_to_block():
    segmenter = make_segmenter("segmenter.layer_decay=0.5")
    names = {id(parameter): name for name, parameter in segmenter.named_parameters()}
    groups = segmenter.parameter_groups(0.05)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    assert (
        scale["head.classifier.weight"] == scale["pyramid.up2.weight"] == scale["auxiliary_head.classifier.bias"] == 1
    )
    assert scale["vit.blocks.3.mlp.fc1.weight"] == 0.5 and scale["vit.blocks.0.attn.qkv.weight"] == 0.5**4
    assert scale["vit.pos_embed"] == scale["vit.patch_embed.proj.weight"] == 0.5**5
    assert decay["vit.blocks.3.mlp.fc1.weight"] == decay["head.classifier.weight"] == 0.05
    for name in ("vit.pos_embed", "vit.cls_token", "head.bottleneck.batch_norm.weight", "vit.blocks.0.ls1.gamma"):
        assert decay[name] == 0, name
    assert decay["vit.blocks.0.attn.rel_pos.relative_position_bias_table"] == 0


def test_the_loss_is_cross_entropy_with_unlabeled_pixels_as_zero():
    segmenter, (images, targets) = make_segmenter("segmenter.dropout=0.0", "segmenter.photometric=false"), batch()
    output = segmenter(images, neutral_noise(segmenter, 3), targets)
    labels = torch.stack([target["labels"] for target in targets]).long()
    terms = []
    for logits in make_segmenter().all_logits(images):
        resized = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        terms.append(F.cross_entropy(resized, labels, ignore_index=IGNORED) * (labels != IGNORED).float().mean())
    torch.testing.assert_close(output.loss, terms[0] + 0.4 * terms[1])
    torch.testing.assert_close(output.metrics["head_loss"], terms[0].detach())


def test_every_parameter_gets_a_gradient():
    segmenter, (images, targets) = make_segmenter(), batch()
    segmenter(images, torch.rand(3, segmenter.noise_size), targets).loss.backward()
    # The biases of keys and of convolutions before a normalization have gradients too, though they are zero.
    assert all(parameter.grad is not None for parameter in segmenter.parameters())


def test_noise_distorts_drops_and_never_affects_predictions():
    segmenter, (images, targets) = make_segmenter("segmenter.drop_path=0.5"), batch()
    noise = neutral_noise(segmenter, 3)
    losses = [segmenter(images, noise, targets).loss]
    for first, last in ((0, 9), (9, 17), (17, 33), (33, 49)):  # distortion, drop path, dropout of both heads
        changed = noise.clone()
        changed[:, first:last] = torch.linspace(0.0, 0.3, last - first)
        losses.append(segmenter(images, changed, targets).loss)
    assert segmenter.noise_size == 49 and len({round(loss.item(), 6) for loss in losses}) == 5
    first, second = segmenter.predict_logits(images), segmenter.predict_logits(images)
    assert torch.equal(first, second) and first.shape == (3, CLASSES, SIDE, SIDE) and segmenter.training


def test_padding_stays_zero_under_distortion():
    segmenter, (images, _) = make_segmenter(), batch(1)
    images[:, :, 20:] = images[:, :, :, 25:] = 0
    noise = torch.zeros(1, 9)  # everything is used
    distorted = segmenter._distort(images, noise, torch.tensor([[25, 20]]))
    assert not distorted[:, :, 20:].any() and not distorted[:, :, :, 25:].any()
    assert (distorted[:, :, :20, :25] != images[:, :, :20, :25]).float().mean() > 0.9


def test_weights_of_lomar_are_an_error(tmp_path):
    source = tmp_path / "lomar.yaml"
    small = ["model.width=32", "model.depth=2", "model.decoder_width=32", "model.decoder_depth=1", "data.image_size=64"]
    small += ["model.heads=2", "model.decoder_heads=2", "model.patch_size=8", "method.lomar.window_size=3"]
    source.write_text(load_recipe("vitb16_lomar", small).to_yaml())
    with pytest.raises(UserError, match="LoMaR"):
        SegmentationTask(recipe(), None).load_encoder(f"random:{source}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("segmenter.scale=[2.0,0.5]", "segmenter.scale"),
        ("segmenter.window_stride=33", "segmenter.window_stride"),
        ("data.crops_per_image=2", "data.crops_per_image"),
        ("segmenter.widow_stride=3", "widow_stride"),
        ("optim.decay=poly", "optim.decay"),
        ("engine.compile=true", "engine.compile"),
    ],
)
def test_impossible_recipes_are_errors_that_name_the_key(override, key):
    with pytest.raises(UserError, match=key):
        recipe(override)


def test_the_window_stride_is_two_thirds_of_the_window():
    assert recipe(name="segment_vitb16").window_stride == recipe("data.image_size=512").window_stride == 341
