"""Efficient MAE and its ablations against really dropping patches, image by image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_methods import random_batch, tiny_method

from pipeline.difficulty import difficulty, patch_distance
from pipeline.errors import UserError
from pipeline.losses import patchify
from pipeline.masking import as_mask, gather_tokens
from pipeline.methods.efficient_mae import interval_index
from pipeline.models.block import ROW_ALIGNMENT
from pipeline.recipe import load_recipe

GRID, PATCHES, VISIBLE = 10, 100, 15
OPTION = "method.efficient_mae."


def small(*options: str):
    return tiny_method("efficient_mae", 40, *(OPTION + option for option in options))


def flatten_weight(distance: float) -> float:
    return distance**-0.6


def plain_loss(method, batch, beta=None, num_predicted=None, weight_of=flatten_weight, **distance) -> float:
    """The definition: per image, drop patches that are too hard before the decoder, then weight the rest."""
    losses = []
    for image, row in zip(*batch, strict=True):
        order = row.argsort(stable=True)
        visible_ids, masked_ids = order[None, :VISIBLE], order[VISIBLE:]
        visible = as_mask(visible_ids, PATCHES).view(1, GRID, GRID)
        d = difficulty(visible, 4, **{"metric": "p2dist", "exact": False, "num_nearest": 8} | distance)
        d = d.flatten()[masked_ids]
        kept = [i for i in range(len(d)) if d[i].isfinite() and (beta is None or d[i] <= beta)]
        if num_predicted is not None:
            kept = sorted(kept, key=lambda i: round(d[i].item() * 1024))[:num_predicted]
        patches = patchify(image[None], 4)
        encoded = method.encoder(gather_tokens(patches, visible_ids), visible_ids)
        kept_ids = masked_ids[kept][None]
        prediction = method.decoder(encoded, visible_ids, kept_ids)[0].double()
        target = method.make_targets(patches, kept_ids)[0].double()
        error = (prediction - target).square().mean(dim=1)
        weight = torch.tensor([weight_of(x) for x in d[kept].tolist()], dtype=torch.float64)
        losses.append((weight * error).sum() / weight.sum())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("beta", ["null", "3", "6"])
def test_without_prediction_ratio_only_the_threshold_drops(beta, exact):
    method = small(f"beta={beta}", "prediction_ratio=null", f"exact_distance={str(exact).lower()}")
    images, noise = random_batch(method, 4)
    out = method(images, noise)
    threshold = None if beta == "null" else float(beta)
    expected = plain_loss(method, (images, noise), beta=threshold, exact=exact)
    assert abs(out.loss.item() - expected) < 1e-5
    assert out.predicted_ids.shape == (4, PATCHES - VISIBLE)


@settings(max_examples=25)
@given(st.sampled_from(["3", "6", "null"]), st.integers(1, 85), st.booleans(), st.integers(0, 10**6))
def test_prediction_ratio_keeps_the_easiest_patches(beta, num_predicted, exact, seed):
    method = small(f"beta={beta}", f"prediction_ratio={num_predicted / PATCHES}", f"exact_distance={exact}".lower())
    images, noise = random_batch(method, 2, seed)
    out = method(images, noise)
    threshold = None if beta == "null" else float(beta)
    expected = plain_loss(method, (images, noise), threshold, num_predicted, exact=exact)
    assert abs(out.loss.item() - expected) < 1e-5
    assert out.predicted_ids.shape == (2, num_predicted)


def test_gradients_equal_really_dropping_patches():
    method = small("beta=4", "prediction_ratio=null")
    images, noise = random_batch(method, 1)
    method(images, noise).loss.backward()
    packed = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    visible_ids, masked_ids = noise.argsort()[:, :VISIBLE], noise.argsort()[:, VISIBLE:]
    d = patch_distance(as_mask(visible_ids, PATCHES).view(1, GRID, GRID), 4).flatten(1).gather(1, masked_ids)
    kept_ids, d = masked_ids[d <= 4][None], d[d <= 4]
    patches = patchify(images, 4)
    encoded = method.encoder(gather_tokens(patches, visible_ids), visible_ids)
    prediction = method.decoder(encoded, visible_ids, kept_ids)
    error = (prediction - method.make_targets(patches, kept_ids)).square().mean(dim=2)[0]
    ((d**-0.6 * error).sum() / (d**-0.6).sum()).backward()
    assert all(torch.allclose(packed[name], p.grad, atol=1e-5) for name, p in method.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("vitb16", (), 150),  # Table 8
        ("vitl16", ("beta=13",), 114),
        ("vitl16", ("beta=null",), 167),
        ("vitl16", ("metric=neighbors_3x3", "beta=null"), 114),  # Table 5
        ("vitl16", ("mask_ratio=0.9",), 136),
        ("vitl16", ("mask_ratio=0.95",), 92),
        ("vitl16", ("prediction_ratio=0.5",), 98),
        ("vith14", (), 203),
    ],
)
def test_decoder_slots_are_the_mean_count_within_beta(name, options, slots):
    recipe = load_recipe(f"{name}_efficient_mae", [OPTION + option for option in options])
    assert abs(recipe.num_predicted - slots) <= (0 if "prediction_ratio=0.5" in options else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_decoder_blocks_share_one_aligned_mask(dtype):
    method = small("beta=4", "prediction_ratio=null").to(dtype)
    masks = []
    for block in method.decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[1]))
    out = method(*random_batch(method, 2))
    (mask,) = {id(mask): mask for mask in masks}.values()
    assert len(masks) == 2 and mask.dtype == dtype and mask.shape == (2, 1, 1, 1 + PATCHES)
    assert all(stride % ROW_ALIGNMENT == 0 for stride in mask.stride()[:3]) and mask.stride(3) == 1
    kept = (mask[:, 0, 0, 1 + VISIBLE :] == 0).sum(dim=1)
    assert kept.float().mean() == out.metrics["decoded_patches"]
    assert mask[:, :, :, : 1 + VISIBLE].eq(0).all() and mask.flatten().unique().tolist() == [-torch.inf, 0]


@pytest.mark.parametrize("metric", ["neighbors_3x3", "inverse_distance_5x5", "nearest_patch"])
def test_metrics_of_table_5_weight_by_their_difficulty(metric):
    method = small("beta=null", "prediction_ratio=null", f"metric={metric}")
    images, noise = random_batch(method, 4)
    expected = plain_loss(method, (images, noise), metric=metric)
    assert abs(method(images, noise).loss.item() - expected) < 1e-5


def test_thresholding_of_table_6a_drops_without_weights():
    method = small("scheduler=threshold", "beta=4", "prediction_ratio=null")
    images, noise = random_batch(method, 4)
    expected = plain_loss(method, (images, noise), beta=4.0, weight_of=lambda d: 1.0)
    assert abs(method(images, noise).loss.item() - expected) < 1e-5


@pytest.mark.parametrize(
    ("end", "progress", "beta"),
    [
        ("6.5", 0.0, 2.25),  # 9 px at patch 16
        ("6.5", 0.5, 4.375),
        ("6.5", 1.0, 6.5),
        ("null", 0.0, 2.25),
        ("null", 0.5, 4.5),
        ("null", 1.0, float("inf")),  # "no additional restriction is imposed"
    ],
)
def test_scheduling_of_table_6b_raises_the_threshold(end, progress, beta):
    method = small("scheduler=schedule", f"beta={end}", "prediction_ratio=null")
    method.set_training_progress(progress)
    images, noise = random_batch(method, 4)
    out = method(images, noise)
    visible = as_mask(out.visible_ids, PATCHES).view(4, GRID, GRID)
    d = patch_distance(visible, 4).flatten(1).gather(1, out.predicted_ids)
    assert out.metrics["decoded_patches"] == (d <= beta).float().sum(1).mean()
    if progress == 1:
        expected = plain_loss(method, (images, noise), beta=beta, weight_of=lambda d: 1.0)
        assert abs(out.loss.item() - expected) < 1e-5


def test_weights_of_table_6c_are_ratios_of_counts():
    """Count again with other masks, one patch at a time."""
    method = small("scheduler=normalize", "beta=null", "prediction_ratio=null")
    generator = np.random.default_rng(1)
    counts = np.zeros((2, 16))
    for row, masked_share in enumerate((0.75, 0.85)):
        for _ in range(400):
            visible = np.zeros(PATCHES, bool)
            visible[generator.permutation(PATCHES)[: PATCHES - round(masked_share * PATCHES)]] = True
            d = patch_distance(torch.tensor(visible).view(1, GRID, GRID), 4).flatten().double().numpy()
            for index in np.flatnonzero(~visible):
                counts[row, min(15, int(d[index] // 1))] += 1  # a quarter of a patch is a pixel here
    common = counts.min(axis=0) > 1000
    assert common.sum() >= 4
    expected = counts[0, common] / counts[1, common]
    assert np.allclose(method.interval_weights.double().numpy()[common], expected, rtol=0.1)


def test_normalization_of_table_6c_weights_by_interval():
    method = small("scheduler=normalize", "beta=null", "prediction_ratio=null")
    images, noise = random_batch(method, 4)
    weights = method.interval_weights

    def weight_of(d: float) -> float:
        return weights[interval_index(torch.tensor(d), 4)].item()

    expected = plain_loss(method, (images, noise), weight_of=weight_of)
    assert abs(method(images, noise).loss.item() - expected) < 1e-5
    assert weights[2:4].min() > weights[7:].max()  # easy patches are rarer and hard ones more common than in MAE


def test_reconstruction_includes_the_hardest_patches():
    method = small()
    images, noise = random_batch(method, 4)
    visible, pixels = method.reconstruct(images, noise)
    truth = patchify(images, 4)[:, None]
    assert visible.shape == (4, 1, PATCHES) and pixels.shape == (4, 1, PATCHES, 48)
    assert not torch.isclose(pixels, truth).all(dim=-1)[~visible].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mask_ratio=0.999"], "mask_ratio: 0.999"),
        (["metric=neighbors_3x3"], "beta"),
        (["scheduler=threshold", "beta=null"], "beta"),
        (["scheduler=schedule", "beta=null", "metric=neighbors_3x3"], "scheduler: schedule"),
        (["scheduler=normalize", "beta=null", "metric=inverse_distance_5x5"], "scheduler: normalize"),
        (["gamma=1e3"], "gamma"),
        (["scheduler=schedule", "beta=2.2"], "beta: 2.2 px .* at least 2.25"),
        (["beta=2.4"], "beta: 2.4 px .* at least 2.5"),
    ],
)
def test_impossible_options_raise_and_name_the_key(options, message):
    with pytest.raises(UserError, match=rf"method\.efficient_mae\.{message}"):
        small(*options)
