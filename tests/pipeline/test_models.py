"""Encoder and decoder: positions, initialization, order of tokens, ownership of parameters."""

import math

import numpy as np
import pytest
import torch

from pipeline.losses import patchify
from pipeline.masking import gather_tokens
from pipeline.methods import build_method
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.models.sincos_position import sincos_2d
from pipeline.recipe import load_recipe


def small_encoder(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**{"grid": 4, "patch_size": 4, "width": 32, "depth": 2, "heads": 4} | changes)


def small_decoder() -> Decoder:
    torch.manual_seed(1)
    return Decoder(grid=4, patch_size=4, encoder_width=32, width=16, depth=2, heads=2)


@pytest.mark.parametrize(("width", "grid"), [(8, 3), (32, 14)])
def test_positions_equal_the_official_code(width, grid):
    expected = np.zeros((1 + grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for half, coordinate in enumerate((column, row)):  # "here w goes first" (mae/util/pos_embed.py)
                for i in range(width // 4):
                    angle = coordinate / 10000 ** (i / (width // 4))
                    channel = half * width // 2 + i
                    expected[1 + row * grid + column, channel] = math.sin(angle)
                    expected[1 + row * grid + column, channel + width // 4] = math.cos(angle)
    assert np.abs(sincos_2d(width, grid)[0].numpy() - expected).max() < 1e-6


def test_position_width_must_be_a_multiple_of_4():
    with pytest.raises(ValueError, match="width: 6"):
        sincos_2d(6, 2)


def test_patch_projection_equals_the_strided_convolution():
    proj = small_encoder().patch_embed.proj
    images = torch.randn(2, 3, 16, 16)
    expected = torch.nn.functional.conv2d(images, proj.weight, proj.bias, stride=4).flatten(2).mT
    assert torch.allclose(proj(patchify(images, 4)), expected, atol=1e-5)


def test_initialization_equals_mae():
    encoder, decoder = small_encoder(width=128), small_decoder()
    weight = encoder.patch_embed.proj.weight
    limit = math.sqrt(6 / (128 + 48))  # xavier on the flattened weight: fan in 3 x 4 x 4, fan out 128
    assert 0.95 * limit < weight.abs().max() <= limit
    bias = encoder.patch_embed.proj.bias
    limit = 1 / math.sqrt(48)  # a convolution's default
    assert 0.9 * limit < bias.abs().max() <= limit
    qkv = encoder.blocks[0].attn.qkv
    limit = math.sqrt(6 / (128 + 384))
    assert 0.95 * limit < qkv.weight.abs().max() <= limit and not qkv.bias.any()
    assert 0.015 < encoder.cls_token.std() < 0.025
    assert 0.01 < decoder.mask_token.std() < 0.03
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5 and all(n.eps == 1e-6 and (n.weight == 1).all() for n in norms)


def test_order_of_visible_patches_does_not_matter():
    encoder = small_encoder()
    patches, ids = torch.randn(1, 16, 48), torch.tensor([[3, 9, 0, 14]])
    reversed_ids = ids.flip(1)
    tokens = encoder(gather_tokens(patches, ids), ids)[:, 1:]
    reversed_tokens = encoder(gather_tokens(patches, reversed_ids), reversed_ids)[:, 1:]
    assert torch.allclose(reversed_tokens.flip(1), tokens, atol=1e-5)


def test_positions_not_kept_do_not_affect_kept_ones():
    decoder = small_decoder()
    encoded, visible = torch.randn(2, 4, 32), torch.tensor([[0, 1, 2], [5, 9, 3]])
    mask_ids = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 4, 6]])
    keep = torch.tensor([[True, False, True, True, False], [True, True, True, False, False]])
    prediction = decoder(encoded, visible, mask_ids, keep)
    for b in range(2):
        alone = decoder(encoded[b : b + 1], visible[b : b + 1], mask_ids[b : b + 1, keep[b]])
        assert torch.allclose(prediction[b, keep[b]], alone[0], atol=1e-5)


def test_activation_checkpointing_changes_no_gradient():
    patches, ids = torch.randn(2, 5, 48), torch.arange(5).expand(2, 5)
    gradients = []
    for checkpointing in (False, True):
        encoder = small_encoder(activation_checkpointing=checkpointing)
        encoder(patches, ids).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        ["mae"],
        ["mae", "method.mae.mask_tokens_in_encoder=true"],
        ["emae"],
        ["emae", "method.emae.difficulty_flatten=true"],
        ["efficient_mae"],
        ["lomar"],
        ["lomar", "method.lomar.difficulty_flatten=true"],
        ["lomar", "method.lomar.decoder=true"],
    ],
    ids=" ".join,
)
def test_only_its_own_module_uses_a_parameter(settings, checkpointing):
    """ZeRO-3 gathers a module's own parameters before its forward and frees them after it."""
    name, *more = settings
    small = ["data.image_size=32", "model.patch_size=4", "model.depth=2"]
    checkpoint = f"engine.activation_checkpointing={checkpointing}".lower()
    method = build_method(load_recipe("demo_emae", [f"method.name={name}", *more, *small, checkpoint]))
    running: list[torch.nn.Module] = []
    owners, used = {}, set()
    for module in method.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = module
        module.register_forward_pre_hook(lambda module, _: running.append(module))
        module.register_forward_hook(lambda *_: running.pop() and None, always_call=True)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            for value in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(value, torch.nn.Parameter) and running:
                    assert owners[id(value)] is running[-1], func
                    used.add(id(value))
            return func(*args, **(kwargs or {}))

    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, method.noise_size)
    with Watch():
        method(images, noise).loss.backward()  # the backward pass recomputes checkpointed blocks
    assert not running and used == owners.keys()
