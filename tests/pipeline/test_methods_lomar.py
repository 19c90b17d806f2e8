"""LoMaR: windows, relative positions and loss against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_methods import random_batch, tiny_method, unpatchify

from pipeline.difficulty import patch_distance
from pipeline.errors import UserError
from pipeline.export import official_state_dict, timm_state_dict
from pipeline.losses import patchify
from pipeline.masking import draw_windows, pair_windows_as_released, tile_windows
from pipeline.models.block import ROW_ALIGNMENT
from pipeline.models.relative_position import (
    NUM_BUCKETS,
    ContextualProduct,
    RelativeAttention,
    bucket_ids,
    piecewise_index,
)


def small_lomar(*more: str):
    method = tiny_method("lomar", 40, "method.lomar.window_size=5", "method.lomar.num_windows=3", *more)
    with torch.no_grad():  # encodings that start at zero would hide errors
        for block in method.encoder.blocks:
            block.attn.rpe_k.lookup_table_weight.normal_()
    return method


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_windows_are_squares_with_distinct_rows_and_columns(images, window, margin, count, seed):
    grid = window + margin
    noise = torch.rand(images, 2 * (margin + 1), generator=torch.Generator().manual_seed(seed))
    windows = draw_windows(noise, grid, window, count)
    assert windows.shape == (images, count, window**2)
    for image in windows.tolist():
        corners = [divmod(ids[0], grid) for ids in image]
        for (top, left), ids in zip(corners, image, strict=True):
            assert top + window <= grid and left + window <= grid
            assert ids == [(top + y) * grid + left + x for y in range(window) for x in range(window)]
        for axis in zip(*corners, strict=True):
            assert len(set(axis)) == min(count, margin + 1)


@given(st.integers(1, 6), st.integers(0, 9))
def test_tiles_cover_the_image(window, margin):
    tiles = tile_windows(window + margin, window, torch.device("cpu"))
    assert set(tiles.flatten().tolist()) == set(range((window + margin) ** 2))
    assert tiles.shape[1] == math.ceil((window + margin) / window) ** 2


def test_near_offsets_have_distinct_indices_and_far_ones_share():
    """Eq. 18 by hand, alpha 1.9, beta 3.8, gamma 15.2: 4 becomes 1.9 + ln(4/1.9)/ln(8) x 1.9 = 2.58."""
    assert [piecewise_index(offset) for offset in range(8)] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert [piecewise_index(-offset) for offset in range(8)] == [0, -1, -2, -2, -3, -3, -3, -3]


def test_buckets_are_row_times_column_plus_a_class_token_bucket():
    ids = bucket_ids(7)
    assert NUM_BUCKETS == 50 and ids.shape == (50, 50)
    assert (ids[0] == 49).all() and (ids[:, 0] == 49).all()
    for query in range(49):
        for key in range(49):
            row = piecewise_index(query // 7 - key // 7) + 3
            column = piecewise_index(query % 7 - key % 7) + 3
            assert ids[1 + query, 1 + key] == row * 7 + column


@settings(max_examples=25)
@given(st.integers(1, 7), st.sampled_from([1, 5, 64]), st.integers(0, 10**6))
def test_bias_by_a_product_equals_an_index(window, head_dim, seed):
    torch.manual_seed(seed)
    product, tokens = ContextualProduct(head_dim, window).double(), 1 + window**2
    table = product.lookup_table_weight
    torch.nn.init.normal_(table)
    query = torch.randn(2, 3, tokens, head_dim, dtype=torch.float64)
    gradient = torch.randn(2, 3, tokens, tokens, dtype=torch.float64)
    bias = product(query)
    expected = torch.einsum("nhid,dij->nhij", query, table[0][:, bucket_ids(window)])
    assert torch.allclose(bias, expected, rtol=0, atol=1e-12)  # the order of the sums differs
    assert bias.stride(3) == 1 and all(stride % ROW_ALIGNMENT == 0 for stride in bias.stride()[:3])
    (found,) = torch.autograd.grad(bias, table, gradient)
    (wanted,) = torch.autograd.grad(expected, table, gradient)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6))
def test_attention_adds_the_unscaled_query_times_its_encoding(images, window, heads, head_dim, seed):
    torch.manual_seed(seed)
    width, tokens = heads * head_dim, 1 + window**2
    attention = RelativeAttention(width, heads, window).double()
    torch.nn.init.normal_(attention.rpe_k.lookup_table_weight)
    x, buckets = torch.randn(images, tokens, width, dtype=torch.float64), bucket_ids(window)
    query, key, value = attention.qkv(x).view(images, tokens, 3, heads, head_dim).unbind(2)
    expected = torch.empty(images, tokens, heads, head_dim, dtype=torch.float64)
    for b in range(images):
        for h in range(heads):
            for i in range(tokens):
                encoding = attention.rpe_k.lookup_table_weight[0].T
                scores = [
                    query[b, i, h] @ key[b, j, h] / math.sqrt(head_dim) + query[b, i, h] @ encoding[buckets[i, j]]
                    for j in range(tokens)
                ]
                expected[b, i, h] = torch.stack(scores).softmax(0) @ value[b, :, h]
    assert torch.allclose(attention(x), attention.proj(expected.flatten(2)))


@settings(max_examples=25)
@given(
    st.sampled_from(["false", "true"]),
    st.integers(2, 7),
    st.integers(1, 3),
    st.sampled_from([0.4, 0.6, 0.8]),
    st.integers(0, 10**6),
)
def test_loss_equals_each_window_encoded_alone(flatten, side, count, ratio, seed):
    method = small_lomar(
        f"method.lomar.difficulty_flatten={flatten}",
        f"method.lomar.window_size={side}",
        f"method.lomar.num_windows={count}",
        f"method.lomar.mask_ratio={ratio}",
    )
    images, noise = random_batch(method, 2, seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    num_positions, size = 11 - side, side**2
    num_visible = size - int(size * ratio)
    losses = []
    for b in range(2):
        top, left = noise[b, : 2 * num_positions].view(2, -1).argsort(stable=True)
        for k in range(count):
            mask_noise = noise[b, 2 * num_positions + size * k :][:size]
            window = torch.tensor([(top[k] + y) * 10 + left[k] + x for y in range(side) for x in range(side)])
            visible, masked = mask_noise.argsort(stable=True).split([num_visible, size - num_visible])
            assert out.visible_ids[b, k].tolist() == window[visible].tolist()
            assert out.predicted_ids[b, k].tolist() == window[masked].tolist()
            tokens = method.encoder.mask_token[0].expand(size, -1).clone()
            tokens[visible] = method.encoder.patch_embed(patches[b, window[visible]])
            tokens = torch.cat([method.encoder.cls_token[0], tokens])[None]
            for block in method.encoder.blocks:
                tokens = block(tokens)
            prediction = method.pred(method.encoder.norm(tokens))[0, 1 + masked]
            target = method.make_targets(patches[b : b + 1], window[masked][None])[0]
            error = (prediction - target).square().mean(dim=1)
            weight = torch.ones(len(masked))
            if flatten == "true":
                mask = torch.zeros(1, side, side, dtype=torch.bool)
                mask.view(-1)[visible] = True
                weight = patch_distance(mask, 4).flatten()[masked] ** -0.6
            losses.append((weight * error).sum() / weight.sum())
    assert torch.allclose(out.loss, torch.stack(losses).mean(), atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_released_windows_equal_a_plain_loop(batch, num_windows, size):
    """generate_window_patches() of LoMaR's code: images are repeated as a whole, windows once per image."""
    windows = torch.arange(num_windows * size).view(num_windows, size)
    rows = list(zip(list(range(batch)) * num_windows, list(range(num_windows)) * batch, strict=True))
    paired = pair_windows_as_released(windows, batch)
    assert paired.shape == (batch, num_windows, size)
    for row, (image, window) in enumerate(rows):
        assert paired[image, row // batch].tolist() == windows[window].tolist()
    if batch % num_windows == 0:  # one window per image, shared by images n and n + K
        assert (paired == paired[:, :1]).all()
        assert torch.equal(paired[num_windows:], paired[:-num_windows])


def test_released_windows_come_from_the_first_images_noise():
    method = small_lomar("method.lomar.windows=as_released")
    images, noise = random_batch(method, 4)
    out = method(images, noise)
    windows = draw_windows(noise[:1, : method.position_noise_size], 10, 5, 3)[0]
    expected = pair_windows_as_released(windows, 4)
    ids = torch.cat([out.visible_ids, out.predicted_ids], dim=2).sort(dim=2).values
    assert torch.equal(ids, expected)
    masks = out.predicted_ids.sort(dim=2).values
    assert not torch.equal(masks[0], masks[3])  # masks differ although images 0 and 3 share their windows


@settings(max_examples=20)
@given(st.integers(2, 7), st.integers(1, 3), st.sampled_from([0.4, 0.6, 0.8]), st.integers(0, 10**6))
def test_decoder_equals_mae_on_each_window(side, count, ratio, seed):
    options = "decoder=true", f"window_size={side}", f"num_windows={count}", f"mask_ratio={ratio}"
    method = tiny_method("lomar", 40, *(f"method.lomar.{option}" for option in options))
    images, noise = random_batch(method, 2, seed)
    out = method(images, noise)
    out.loss.backward()
    gradients = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    patches, losses = patchify(images, 4), []
    for b in range(2):
        for k in range(count):
            visible_ids, masked_ids = out.visible_ids[b, k][None], out.predicted_ids[b, k][None]
            encoded = method.encoder(patches[b : b + 1, visible_ids[0]], visible_ids)
            prediction = method.decoder(encoded, visible_ids, masked_ids)
            losses.append((prediction - method.make_targets(patches[b : b + 1], masked_ids)).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert torch.allclose(out.loss, loss, atol=1e-5)
    pairs = zip(gradients, method.parameters(), strict=True)
    assert all(torch.allclose(ours, p.grad, atol=1e-5) for ours, p in pairs)


def test_decoder_in_one_window_of_the_whole_image_is_mae():
    options = "decoder=true", "window_size=10", "num_windows=1", "mask_ratio=0.75"
    lomar = tiny_method("lomar", 40, *(f"method.lomar.{option}" for option in options))
    mae = tiny_method("mae", 40)
    mae.load_state_dict(lomar.state_dict())
    images, noise = random_batch(lomar)
    ours, expected = lomar(images, noise), mae(images, noise[:, lomar.position_noise_size :])
    assert torch.equal(ours.loss, expected.loss)
    assert timm_state_dict(lomar).keys() == timm_state_dict(mae).keys()
    assert torch.equal(lomar.forward_features(images), mae.forward_features(images))


def test_a_window_sees_no_patch_outside_itself():
    method = small_lomar()
    images, noise = random_batch(method, 1)
    out = method(images, noise)
    patches = patchify(images, 4)
    visible_ids = out.visible_ids[0, 0]
    changed = torch.full_like(patches, 9.0)
    changed[0, visible_ids] = patches[0, visible_ids]
    prediction = method(unpatchify(changed), noise).prediction
    assert torch.allclose(prediction[0, 0], out.prediction[0, 0], atol=1e-6)


def test_reconstruction_tiles_the_whole_image():
    method = small_lomar("method.lomar.window_size=4")  # 10 patches: 3 windows per side, the last overlaps
    images, noise = random_batch(method)
    visible, pixels = method.reconstruct(images, noise)
    equal = torch.isclose(pixels, patchify(images, 4)[:, None]).all(dim=-1)
    assert visible.shape == (3, 1, 100) and torch.equal(equal, visible)
    assert 0 < visible.float().mean() < 0.5


def test_formats_without_relative_positions_reject_lomar():
    method = small_lomar()
    with pytest.raises(UserError, match="relative positions"):
        timm_state_dict(method)
    with pytest.raises(UserError, match="decoder"):
        official_state_dict(method)


def test_a_window_larger_than_the_image_raises():
    with pytest.raises(UserError, match=r"method\.lomar\.window_size: 11"):
        small_lomar("method.lomar.window_size=11")
