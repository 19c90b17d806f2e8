"""The ablations of MAE's Table 1 (c), (d) and (f) against their plain definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_methods import random_batch, tiny_method

from pipeline.errors import UserError
from pipeline.export import official_state_dict, timm_state_dict
from pipeline.losses import patchify
from pipeline.masking import BLOCK_TRIES, block_noise_size, block_split, gather_tokens, grid_split
from pipeline.recipe import load_recipe

OPTION = "method.mae."


def small_mae(*options: str):
    return tiny_method("mae", 32, *(OPTION + option for option in options))


def pca_mae(components: int):
    return tiny_method("mae", 32, "method.target.name=pca", f"method.target.components={components}")


def plain_blocks(noise: list[float], grid: int, num_visible: int) -> list[int]:
    """Return the visible patches of block-wise masking, one block at a time, in ascending order of noise."""
    patch_noise, draws = noise[: grid**2], np.reshape(noise[grid**2 :], (4, BLOCK_TRIES))
    masked: set[int] = set()
    num_skipped = 0
    for area, aspect, top, left in draws.T.tolist():
        num_left = grid**2 - num_visible - len(masked)
        target, ratio = 16 + (num_left - 16) * area, math.exp(math.log(0.3) * (1 - 2 * aspect))
        height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        row, column = int(top * (grid - height + 1)), int(left * (grid - width + 1))
        block = {r * grid + c for r in range(row, row + height) for c in range(column, column + width)}
        num_skipped += 1
        if height < grid and width < grid and 0 < len(block - masked) <= num_left:
            masked |= block
            num_skipped = 0
        if num_skipped == 10:
            break
    free = [patch for patch in range(grid**2) if patch not in masked]
    return sorted(free, key=lambda patch: patch_noise[patch])[:num_visible]


@settings(max_examples=60)
@given(st.integers(2, 14), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_block_sampling_equals_a_plain_loop(grid, ratio, seed):
    num_visible = max(1, int(grid**2 * (1 - ratio)))
    noise = torch.rand(3, block_noise_size(grid), generator=torch.Generator().manual_seed(seed))
    visible, masked = block_split(noise, grid, num_visible)
    assert visible.shape == (3, num_visible) and masked.shape == (3, grid**2 - num_visible)
    for row in range(3):
        assert visible[row].tolist() == plain_blocks(noise[row].double().tolist(), grid, num_visible)
        assert sorted([*visible[row].tolist(), *masked[row].tolist()]) == list(range(grid**2))


def test_blocks_mask_larger_areas_than_random_patches():
    noise = torch.rand(200, block_noise_size(14), generator=torch.Generator().manual_seed(0))
    neighbors = []
    for visible, _ in (block_split(noise, 14, 98), (noise[:, :196].argsort()[:, :98], None)):
        mask = torch.ones(200, 196).scatter(1, visible, 0.0).view(200, 14, 14)
        neighbors.append((mask[:, 1:] * mask[:, :-1]).mean().item())
    assert neighbors[0] > 0.38 > 0.28 > neighbors[1]  # both patches of a vertical pair: 0.5 x 0.5 if independent


def test_grid_sampling_keeps_one_patch_of_each_2_x_2():
    visible, masked = grid_split(torch.rand(2, 36), 6)
    assert visible.tolist() == [[6 * row + column for row in (0, 2, 4) for column in (0, 2, 4)]] * 2
    assert sorted([*visible[0].tolist(), *masked[0].tolist()]) == list(range(36))


@pytest.mark.parametrize("sampling", ["block", "grid"])
def test_loss_is_maes_on_the_sampled_patches(sampling):
    method, mae = small_mae(f"mask_sampling={sampling}"), small_mae()
    images, noise = random_batch(method)
    split = block_split(noise, 8, 16) if sampling == "block" else grid_split(noise, 8)
    order = torch.cat(split, dim=1)
    same_split = torch.empty(3, 64).scatter(1, order, torch.arange(64).expand(3, -1) / 64)
    assert torch.equal(method(images, noise).loss, mae(images, same_split).loss)


@settings(max_examples=15)
@given(st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 10**6))
def test_mask_tokens_in_the_encoder_equal_the_plain_definition(ratio, seed):
    """All tokens in raster order through timm's blocks; gradients too."""
    method = small_mae("mask_tokens_in_encoder=true", f"mask_ratio={ratio}")
    images, noise = random_batch(method, 2, seed)
    out = method(images, noise)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    encoder, decoder, patches = method.encoder, method.decoder, patchify(images, 4)
    losses = []
    for b in range(2):
        masked = torch.zeros(64, dtype=torch.bool)
        masked[out.predicted_ids[b]] = True
        tokens = torch.where(masked[:, None], encoder.mask_token[0], encoder.patch_embed(patches[b]))
        tokens = torch.cat([encoder.cls_token[0], tokens + encoder.pos_embed[0, 1:]])[None]
        for block in encoder.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        tokens = decoder.embed(encoder.norm(tokens)) + decoder.pos_embed
        for block in decoder.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        prediction = decoder.pred(decoder.norm(tokens))[0, 1:][masked]
        target = method.make_targets(patches[b : b + 1], masked.nonzero().T)[0]
        losses.append((prediction - target).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert torch.allclose(out.loss, loss, atol=1e-5)
    assert all(torch.allclose(gradients[name], p.grad, atol=1e-5) for name, p in method.named_parameters())


@settings(max_examples=15)
@given(st.integers(1, 48), st.integers(0, 10**6))
def test_pca_targets_are_coefficients_of_the_largest_components(components, seed):
    method = pca_mae(components)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, 48)  # distinct variances, so that the components are unique
    patches = torch.randn(12 * 64, 48, generator=generator) * scale + 0.7
    fitted = patches.view(12, 8, 8, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(12, 3, 32, 32)
    method.target.fit(fitted)
    images, noise = random_batch(method, 2, seed)
    out = method(images, noise)
    out.loss.backward()
    data = patches.double().numpy()
    _, _, rows = np.linalg.svd(data - data.mean(0), full_matrices=False)
    largest = rows[:components]
    largest *= np.sign(np.take_along_axis(largest, np.abs(largest).argmax(1)[:, None], 1))
    truth = gather_tokens(patchify(images, 4), out.predicted_ids).double().numpy()
    expected = (truth - data.mean(0)) @ largest.T
    assert np.allclose(out.target.numpy(), expected, atol=1e-3)
    assert out.prediction.shape == out.target.shape == (2, 48, components)
    difference = out.prediction - out.target
    assert torch.allclose(out.loss, difference.square().mean(), atol=1e-6)
    head = method.decoder.pred.bias.grad  # of the mean square over images, patches and coefficients
    assert torch.allclose(head, 2 * difference.sum(dim=(0, 1)) / difference.numel(), atol=1e-5)


def test_all_components_reconstruct_the_image():
    method = pca_mae(48)
    images, noise = random_batch(method)
    with pytest.raises(UserError, match=r"method\.target\.name: pca"):
        method.reconstruct(images, noise)
    assert method(images, noise).loss.isnan()  # nobody trains on components that were not fitted
    method.target.fit(images)
    patches = patchify(images, 4)
    assert torch.allclose(method.target.pca.invert(method.target.pca.project(patches)), patches, atol=1e-5)
    visible, pixels = method.reconstruct(images, noise)
    truth = patches[:, None]
    assert torch.equal(pixels[visible], truth[visible])


def test_fitting_again_gives_the_same_components():
    first, second = (pca_mae(8) for _ in range(2))
    images, _ = random_batch(first, 6)
    for method in (first, second):
        method.target.fit(images)
    patches = patchify(images, 4)
    assert torch.equal(first.target.pca.project(patches), second.target.pca.project(patches))


def test_official_code_cannot_load_other_architectures():
    for method in (small_mae("mask_tokens_in_encoder=true"), pca_mae(8)):
        with pytest.raises(UserError, match=r"method\.(mae|target)\."):
            official_state_dict(method)
        assert timm_state_dict(method).keys() == timm_state_dict(small_mae()).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["mask_sampling=grid", "mask_ratio=0.5"], "mask_sampling: grid requires .*mask_ratio 0.75, not 0.5")],
)
def test_impossible_options_raise_and_name_the_key(options, message):
    with pytest.raises(UserError, match=rf"method\.mae\.{message}"):
        small_mae(*options)


def test_odd_grids_and_too_many_components_raise():
    with pytest.raises(UserError, match="even number of patches along a side, not 7"):
        load_recipe("vitb16_mae", ["data.image_size=112", "method.mae.mask_sampling=grid"])
    with pytest.raises(UserError, match="components: a patch has only 48 values"):
        pca_mae(49)
