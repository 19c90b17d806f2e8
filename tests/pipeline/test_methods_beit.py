"""BEiT against the implementation in transformers."""

from functools import partial

import torch
from timm.models.beit import Beit
from tiny_methods import VOCABULARY, HashTokenizer, random_batch, tiny_method
from torch import nn
from transformers import BeitConfig, BeitForMaskedImageModeling

from pipeline.masking import as_mask
from pipeline.methods.targets import TokenTarget
from pipeline.recipe import load_recipe


def small_beit(*more: str):
    settings = ("method.target.name=tokens", "method.target.tokenizer=.", f"method.target.vocabulary={VOCABULARY}")
    method = tiny_method("beit", 32, *settings, *more)
    assert isinstance(method.target, TokenTarget)
    method.target.tokenizer.codebook = HashTokenizer()
    with torch.no_grad():  # what starts at zero or constant would hide errors
        for name, parameter in method.named_parameters():
            if name.endswith(("bias", "bias_table", "gamma_1", "gamma_2")):
                parameter.normal_(std=0.5)
    return method


def to_transformers(method) -> BeitForMaskedImageModeling:
    """Build the model of transformers with all of our weights."""
    config = BeitConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
    )
    model = BeitForMaskedImageModeling(config).eval()
    state = {}
    for key, value in method.state_dict().items():
        name = transformers_key(key)
        if "attn.qkv" in name:
            state |= {
                name.replace("attn.qkv", f"attention.{x}_proj"): v for x, v in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            state[name] = value
    model.load_state_dict(state)  # strict: no key is missing or unexpected
    return model


def transformers_key(key: str) -> str:
    """Convert a key of BEiT's state dict to that of transformers, except for `attn.qkv`."""
    for ours, theirs in (
        ("encoder.norm.", "layernorm."),
        ("head.", "lm_head."),
        ("encoder.blocks.", "beit.layers."),
        ("encoder.patch_embed.proj", "beit.embeddings.patch_embeddings.projection"),
        ("encoder.rel_pos_bias", "beit.shared_position_bias"),
        ("encoder.", "beit.embeddings."),
        ("gamma_", "lambda_"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.q_bias", "attention.q_proj.bias"),
        ("attn.v_bias", "attention.v_proj.bias"),
        ("attn.proj", "attention.o_proj"),
    ):
        key = key.replace(ours, theirs)
    return key


def test_loss_and_logits_equal_transformers():
    method = small_beit().eval()
    peer = to_transformers(method)
    for seed in range(3):
        images, noise = random_batch(method, 5, seed)
        ours = method(images, noise)
        masked = as_mask(ours.predicted_ids, method.grid**2)
        order = ours.predicted_ids.argsort(dim=1)
        labels = ours.target.gather(1, order).flatten()  # transformers selects in raster order
        theirs = peer(pixel_values=images, bool_masked_pos=masked, labels=labels)
        assert abs(ours.loss.item() - theirs.loss.item()) < 1e-5
        expected = theirs.logits.gather(1, ours.predicted_ids[..., None].expand(-1, -1, VOCABULARY))
        assert torch.allclose(ours.prediction, expected, atol=1e-5)
        assert ours.prediction.std() > 0.1  # the comparison would pass for constant outputs


def test_gradients_equal_transformers():
    method = small_beit().eval()
    peer = to_transformers(method)
    images, noise = random_batch(method, 4)
    ours = method(images, noise)
    ours.loss.backward()
    labels = ours.target.gather(1, ours.predicted_ids.argsort(dim=1)).flatten()
    peer(pixel_values=images, bool_masked_pos=as_mask(ours.predicted_ids, 64), labels=labels).loss.backward()
    theirs = dict(peer.named_parameters())
    for key, parameter in method.named_parameters():
        if "attn.qkv" not in key:
            assert torch.allclose(parameter.grad, theirs[transformers_key(key)].grad, atol=1e-5), key


def test_features_equal_timm():
    method = small_beit().eval()
    model = Beit(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="", norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    state = method.encoder.state_dict()
    del state["mask_token"]
    model.load_state_dict(state)
    images, _ = random_batch(method, 3)
    with torch.no_grad():
        assert torch.allclose(method.forward_features(images), model.forward_features(images), atol=1e-5)


def test_masks_75_of_196_patches():
    recipe = load_recipe("vitb16_beit", ["method.target.name=pixels", "method.target.tokenizer=null"])
    assert recipe.num_patches - recipe.num_visible == 75


def test_stochastic_depth_depends_on_noise_only():
    method = small_beit("method.beit.drop_path=0.9")
    images, noise = random_batch(method, 16)
    torch.manual_seed(1)
    first = method(images, noise).loss
    torch.manual_seed(2)
    assert torch.equal(first, method(images, noise).loss)
    kept = noise.clone()
    kept[:, -4:] = 0.999  # no branch is dropped, but kept ones are scaled
    assert not torch.equal(first, method(images, kept).loss)
    evaluated = method.eval()(images, noise).loss
    assert torch.equal(evaluated, method(images, kept).loss)
