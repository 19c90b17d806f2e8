"""MAE against transformers' and against the official algorithm in float64."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from pipeline.export import load_official_state_dict, official_state_dict
from pipeline.losses import patchify
from pipeline.methods import build_method
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "model.decoder_width=16",
    "model.decoder_depth=2",
    "model.decoder_heads=2",
    "data.image_size=24",
)


def small_mae(*more: str):
    torch.manual_seed(0)
    method = build_method(load_recipe("vitb16_mae", [*SMALL, *more]))
    with torch.no_grad():  # biases start at zero and would hide their mistakes
        for name, parameter in method.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return method


def transformers_keys(official: str) -> list[str]:
    """Official MAE key -> the key in transformers' ViTMAE; three for q, k and v, which it keeps apart."""
    decoder = official.startswith("decoder_") or official == "mask_token"
    key = official
    for ours, theirs in (
        ("decoder_blocks.", "decoder_layers."),
        ("blocks.", "layers."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.o_proj"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ):
        key = key.replace(ours, theirs)
    if not decoder:
        key = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(
            key, key
        )
        key = key.replace("norm.", "layernorm.") if key.startswith("norm.") else key
    key = f"decoder.{key}" if decoder else f"vit.{key}"
    if "attn.qkv" in key:
        return [key.replace("attn.qkv", f"attention.{name}_proj") for name in "qkv"]
    return [key]


def in_transformers(method) -> ViTMAEForPreTraining:
    """transformers' own model with our weights, every one of them."""
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        image_size=24,
        patch_size=4,
        mask_ratio=0.75,
        norm_pix_loss=method.normalize_targets,
        layer_norm_eps=1e-6,
    )
    model = ViTMAEForPreTraining(config).eval()
    wanted = model.state_dict()
    state = {}
    for key, value in official_state_dict(method).items():
        names = transformers_keys(key)
        state |= dict(zip(names, value.chunk(len(names)), strict=True))
    assert state.keys() == wanted.keys(), state.keys() ^ wanted.keys()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_the_loss_is_that_of_transformers_with_the_same_weights_and_noise(normalize):
    method = small_mae(f"method.normalize_targets={normalize}").eval()
    peer = in_transformers(method)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(5, 3, 24, 24, generator=generator)
        noise = torch.rand(5, method.noise_size, generator=generator)
        ours = method(images, noise)
        theirs = peer(pixel_values=images, noise=noise)
        assert abs(ours.loss.item() - theirs.loss.item()) < 1e-5
        expected = theirs.logits.gather(1, ours.predicted_ids[..., None].expand(-1, -1, 48))
        assert torch.allclose(ours.prediction, expected, atol=1e-5)


def test_the_gradient_is_that_of_transformers():
    method = small_mae()
    peer = in_transformers(method)
    images, noise = torch.randn(4, 3, 24, 24), torch.rand(4, method.noise_size)
    method(images, noise).loss.backward()
    peer(pixel_values=images, noise=noise).loss.backward()
    theirs = dict(peer.named_parameters())
    for name, ours in method.named_parameters():
        official = (
            name.removeprefix("encoder.").replace("decoder.", "decoder_").replace("decoder_mask", "mask")
        )
        expected = torch.cat([theirs[key].grad for key in transformers_keys(official)])
        assert torch.allclose(ours.grad, expected, atol=1e-5), name


def test_the_loss_does_not_depend_on_how_the_batch_is_cut():
    method = small_mae()
    images, noise = torch.randn(6, 3, 24, 24), torch.rand(6, method.noise_size)
    whole = method(images, noise).loss
    cut = torch.stack([method(images[i : i + 2], noise[i : i + 2]).loss for i in (0, 2, 4)]).mean()
    assert torch.allclose(whole, cut, atol=1e-6)


def test_only_the_loss_carries_a_gradient():
    method = small_mae()
    out = method(torch.randn(2, 3, 24, 24), torch.rand(2, method.noise_size))
    tensors = [*out[1:5], *out.metrics.values()]
    assert out.loss.requires_grad and not any(tensor.requires_grad for tensor in tensors)
    assert out.loss.dtype == out.prediction.dtype == out.target.dtype == torch.float32


def test_in_bf16_the_images_stay_whole_and_the_loss_is_close_to_fp32():
    method = small_mae()
    images, noise = torch.randn(4, 3, 24, 24), torch.rand(4, method.noise_size)
    exact = method(images, noise)
    rounded = method.bfloat16()(images, noise)
    assert rounded.loss.dtype == torch.float32
    assert torch.equal(rounded.target, exact.target)
    assert abs(rounded.loss - exact.loss) < 0.02 * exact.loss


def test_a_reconstruction_keeps_what_was_seen_and_puts_predictions_on_the_images_scale():
    method = small_mae()
    images, noise = torch.randn(2, 3, 24, 24) * 0.3 + 2, torch.rand(2, method.noise_size)
    out, picture = method(images, noise), method.reconstruct(images, noise)
    patches = patchify(images, 4)
    assert picture.visible.shape == (2, 1, 36) and picture.visible.sum(-1).tolist() == [[9], [9]]
    assert torch.equal(picture.pixels[:, 0][picture.visible[:, 0]], patches[picture.visible[:, 0]])
    b, m = 1, 5
    at = out.predicted_ids[b, m]
    truth = patches[b, at].double()
    expected = out.prediction[b, m].double() * (truth.var() + 1e-6).sqrt() + truth.mean()
    assert torch.allclose(picture.pixels[b, 0, at].double(), expected, atol=1e-5)


def test_official_weights_survive_a_round_trip_bit_by_bit():
    method = small_mae()
    state = {key: torch.randn_like(value) for key, value in official_state_dict(method).items()}
    load_official_state_dict(method, state)
    again = official_state_dict(method)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
