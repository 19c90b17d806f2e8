"""MAE against the implementation in transformers, and its official weights."""

import pytest
import torch
from tiny_methods import random_batch, tiny_method
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from pipeline.export import load_official_state_dict, official_state_dict
from pipeline.losses import patchify


def small_mae(*more: str):
    method = tiny_method("mae", 24, *more)
    with torch.no_grad():  # biases that start at zero would hide errors
        for name, parameter in method.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return method


def transformers_keys(official: str) -> list[str]:
    """Convert an official MAE key to the keys of ViTMAE in transformers: three for q, k and v."""
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
        embeddings = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
        key = embeddings.get(key, key)
        key = key.replace("norm.", "layernorm.") if key.startswith("norm.") else key
    key = f"decoder.{key}" if decoder else f"vit.{key}"
    if "attn.qkv" in key:
        return [key.replace("attn.qkv", f"attention.{name}_proj") for name in "qkv"]
    return [key]


def to_transformers(method) -> ViTMAEForPreTraining:
    """Build the model of transformers with all of our weights."""
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
        norm_pix_loss=method.target.normalized,
        layer_norm_eps=1e-6,
    )
    model = ViTMAEForPreTraining(config).eval()
    state = {}
    for key, value in official_state_dict(method).items():
        names = transformers_keys(key)
        state |= dict(zip(names, value.chunk(len(names)), strict=True))
    model.load_state_dict(state)  # strict: no key is missing or unexpected
    return model


@pytest.mark.parametrize("target", ["normalized_pixels", "pixels"])
def test_loss_and_prediction_equal_transformers(target):
    method = small_mae(f"method.target.name={target}").eval()
    peer = to_transformers(method)
    for seed in range(3):
        images, noise = random_batch(method, 5, seed)
        ours = method(images, noise)
        theirs = peer(pixel_values=images, noise=noise)
        assert abs(ours.loss.item() - theirs.loss.item()) < 1e-5
        expected = theirs.logits.gather(1, ours.predicted_ids[..., None].expand(-1, -1, 48))
        assert torch.allclose(ours.prediction, expected, atol=1e-5)


def test_gradients_equal_transformers():
    method = small_mae()
    peer = to_transformers(method)
    images, noise = random_batch(method, 4)
    method(images, noise).loss.backward()
    peer(pixel_values=images, noise=noise).loss.backward()
    theirs = dict(peer.named_parameters())
    for name, ours in method.named_parameters():
        official = name.removeprefix("encoder.").replace("decoder.", "decoder_")
        keys = transformers_keys(official.replace("decoder_mask", "mask"))
        assert torch.allclose(ours.grad, torch.cat([theirs[key].grad for key in keys]), atol=1e-5), name


def test_reconstruction_keeps_visible_and_denormalizes_masked():
    method = small_mae()
    images, noise = random_batch(method, 2)
    images = images * 0.3 + 2
    out, reconstruction = method(images, noise), method.reconstruct(images, noise)
    visible, patches = reconstruction.visible, patchify(images, 4)
    assert visible.shape == (2, 1, 36) and visible.sum(-1).tolist() == [[9], [9]]
    assert torch.equal(reconstruction.pixels[:, 0][visible[:, 0]], patches[visible[:, 0]])
    b, m = 1, 5
    position = out.predicted_ids[b, m]
    truth = patches[b, position].double()
    expected = out.prediction[b, m].double() * (truth.var() + 1e-6).sqrt() + truth.mean()
    assert torch.allclose(reconstruction.pixels[b, 0, position].double(), expected, atol=1e-5)


def test_official_weights_survive_a_round_trip_bit_by_bit():
    method = small_mae()
    state = {key: torch.randn_like(value) for key, value in official_state_dict(method).items()}
    load_official_state_dict(method, state)
    reloaded = official_state_dict(method)
    assert reloaded.keys() == state.keys() and all(torch.equal(reloaded[key], state[key]) for key in state)
