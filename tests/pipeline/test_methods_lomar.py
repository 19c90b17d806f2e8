"""LoMaR: windows, relative positions and loss against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.difficulty import patch_distance
from pipeline.errors import UserError
from pipeline.export import official_state_dict, timm_state_dict
from pipeline.losses import patchify
from pipeline.masking import draw_windows, gather_tokens, tile_windows
from pipeline.methods import build_method
from pipeline.models.relative_position import NUM_BUCKETS, RelativeAttention, bucket_ids, piecewise_index
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "data.image_size=40",
    "method.lomar.window_size=5",
    "method.lomar.num_windows=3",
)


def small_lomar(*more: str):
    torch.manual_seed(0)
    method = build_method(load_recipe("vitb16_lomar", [*SMALL, *more]))
    with torch.no_grad():  # the encodings start at zero, which would hide their mistakes
        for block in method.encoder.blocks:
            block.attn.rpe_k.lookup_table_weight.normal_()
    return method


def batch(method, size: int = 3, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 40, 40, generator=generator),
        torch.rand(size, method.noise_size, generator=generator),
    )


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_windows_are_squares_inside_the_image_in_rows_and_columns_of_their_own(
    images, window, room, count, seed
):
    grid = window + room
    noise = torch.rand(images, 2 * (room + 1), generator=torch.Generator().manual_seed(seed))
    windows = draw_windows(noise, grid, window, count)
    assert windows.shape == (images, count, window**2)
    for image in windows.tolist():
        corners = [divmod(ids[0], grid) for ids in image]
        for (top, left), ids in zip(corners, image, strict=True):
            assert top + window <= grid and left + window <= grid
            assert ids == [(top + y) * grid + left + x for y in range(window) for x in range(window)]
        for axis in zip(*corners, strict=True):
            assert len(set(axis)) == min(count, room + 1)


@given(st.integers(1, 6), st.integers(0, 9))
def test_tiles_cover_the_image(window, room):
    tiles = tile_windows(window + room, window, torch.device("cpu"))
    assert set(tiles.flatten().tolist()) == set(range((window + room) ** 2))
    assert tiles.shape[1] == math.ceil((window + room) / window) ** 2


def test_near_offsets_have_an_index_of_their_own_and_far_ones_share():
    """By hand from Eq. 18 with alpha 1.9, beta 3.8, gamma 15.2: 4 is 1.9 + ln(4/1.9)/ln(8) x 1.9 = 2.58."""
    assert [piecewise_index(offset) for offset in range(8)] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert [piecewise_index(-offset) for offset in range(8)] == [0, -1, -2, -2, -3, -3, -3, -3]


def test_buckets_are_the_product_of_row_and_column_offset_and_one_for_the_class_token():
    ids = bucket_ids(7)
    assert NUM_BUCKETS == 50 and ids.shape == (50, 50)
    assert (ids[0] == 49).all() and (ids[:, 0] == 49).all()
    for query in range(49):
        for key in range(49):
            row = piecewise_index(query // 7 - key // 7) + 3
            column = piecewise_index(query % 7 - key % 7) + 3
            assert ids[1 + query, 1 + key] == row * 7 + column


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6))
def test_attention_is_the_plain_one_plus_the_unscaled_query_times_its_encoding(
    images, window, heads, depth, seed
):
    torch.manual_seed(seed)
    width, tokens = heads * depth, 1 + window**2
    attention = RelativeAttention(width, heads, window).double()
    torch.nn.init.normal_(attention.rpe_k.lookup_table_weight)
    x, buckets = torch.randn(images, tokens, width, dtype=torch.float64), bucket_ids(window)
    query, key, value = attention.qkv(x).view(images, tokens, 3, heads, depth).unbind(2)
    expected = torch.empty(images, tokens, heads, depth, dtype=torch.float64)
    for b in range(images):
        for h in range(heads):
            for i in range(tokens):
                encoding = attention.rpe_k.lookup_table_weight[0].T
                scores = [
                    query[b, i, h] @ key[b, j, h] / math.sqrt(depth)
                    + query[b, i, h] @ encoding[buckets[i, j]]
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
def test_the_loss_is_the_mean_over_masked_patches_of_every_window_alone(flatten, side, count, ratio, seed):
    method = small_lomar(
        f"method.lomar.difficulty_flatten={flatten}",
        f"method.lomar.window_size={side}",
        f"method.lomar.num_windows={count}",
        f"method.lomar.mask_ratio={ratio}",
    )
    images, noise = batch(method, 2, seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    places, size = 11 - side, side**2
    seen_count = size - int(size * ratio)
    losses = []
    for b in range(2):
        top, left = noise[b, :places].argsort(), noise[b, places : 2 * places].argsort()
        for k in range(count):
            mask_noise = noise[b, 2 * places + size * k :][:size]
            window = torch.tensor([(top[k] + y) * 10 + left[k] + x for y in range(side) for x in range(side)])
            visible, masked = mask_noise.argsort().split([seen_count, size - seen_count])
            assert out.visible_ids[b, k].tolist() == window[visible].tolist()
            assert out.predicted_ids[b, k].tolist() == window[masked].tolist()
            tokens = method.encoder.mask_token[0].expand(size, -1).clone()
            tokens[visible] = method.encoder.patch_embed(patches[b, window[visible]])
            tokens = torch.cat([method.encoder.cls_token[0], tokens])[None]
            for block in method.encoder.blocks:
                tokens = block(tokens)
            prediction = method.pred(method.encoder.norm(tokens))[0, 1 + masked]
            error = (prediction - method.targets(patches[b, window[masked]])).square().mean(dim=1)
            weight = torch.ones(len(masked))
            if flatten == "true":
                seen = torch.zeros(1, side, side, dtype=torch.bool)
                seen.view(-1)[visible] = True
                weight = patch_distance(seen, 4).flatten()[masked] ** -0.6
            losses.append((weight * error).sum() / weight.sum())
    assert torch.allclose(out.loss, torch.stack(losses).mean(), atol=1e-5)


def test_a_window_sees_nothing_outside_itself():
    method = small_lomar()
    images, noise = batch(method, 1)
    out = method(images, noise)
    patches = patchify(images, 4)
    seen = out.visible_ids[0, 0]
    changed = torch.full_like(patches, 9.0)
    changed[0, seen] = patches[0, seen]
    again = changed.view(1, 10, 10, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 40, 40)
    assert torch.allclose(method(again, noise).prediction[0, 0], out.prediction[0, 0], atol=1e-6)


def test_reconstruction_tiles_the_whole_image():
    method = small_lomar(
        "method.lomar.window_size=4"
    )  # 10 patches: 3 windows a side, the last ones overlapping
    images, noise = batch(method)
    picture = method.reconstruct(images, noise)
    truth = patchify(images, 4)[:, None]
    same = torch.isclose(picture.pixels, truth).all(dim=-1)
    assert picture.visible.shape == (3, 1, 100) and torch.equal(same, picture.visible)
    assert 0 < picture.visible.float().mean() < 0.5


def test_relative_positions_are_refused_where_the_target_has_none():
    method = small_lomar()
    with pytest.raises(UserError, match="relative positions"):
        timm_state_dict(method)
    with pytest.raises(UserError, match="LoMaR has no decoder"):
        official_state_dict(method)


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(UserError, match=r"method\.lomar\.window_size: 11 patches do not fit"):
        small_lomar("method.lomar.window_size=11")


def test_targets_are_normalised_patch_by_patch():
    method = small_lomar()
    images, noise = batch(method)
    out = method(images, noise)
    patches = patchify(images, 4)
    assert torch.allclose(out.target[:, 1], method.targets(gather_tokens(patches, out.predicted_ids[:, 1])))
