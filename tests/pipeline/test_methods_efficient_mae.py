"""Efficient MAE: the packed layout against really dropping patches, image by image; its ablations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.difficulty import difficulty, patch_distance
from pipeline.errors import UserError
from pipeline.losses import patchify
from pipeline.masking import as_mask, gather_tokens
from pipeline.methods import build_method
from pipeline.methods.efficient_mae import interval
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "model.decoder_width=16",
    "model.decoder_depth=2",
    "model.decoder_heads=2",
    "data.image_size=40",
)
GRID, PATCHES, VISIBLE = 10, 100, 15
OPTION = "method.efficient_mae."


def small(*options: str):
    torch.manual_seed(0)
    return build_method(load_recipe("vitb16_efficient_mae", [*SMALL, *(OPTION + o for o in options)]))


def batch(method, size: int = 4, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 40, 40, generator=generator),
        torch.rand(size, method.noise_size, generator=generator),
    )


def plain(method, images, noise, *, beta=None, slots=None, weigh, metric="p2dist", exact=False) -> float:
    """The definition: per image, drop what is too hard before the decoder, then weigh the rest."""
    losses = []
    for image, row in zip(images, noise, strict=True):
        order = row.argsort()
        visible_ids, masked_ids = order[None, :VISIBLE], order[VISIBLE:]
        visible = as_mask(visible_ids, PATCHES).view(1, GRID, GRID)
        d = difficulty(visible, 4, metric, exact, 8).flatten()[masked_ids]
        kept = [i for i in range(len(d)) if d[i].isfinite() and (beta is None or d[i] <= beta)]
        if slots is not None:
            kept = sorted(kept, key=lambda i: round(d[i].item() * 1024))[:slots]
        patches = patchify(image[None], 4)
        encoded = method.encoder(gather_tokens(patches, visible_ids), visible_ids)
        asked = masked_ids[kept][None]
        prediction = method.decoder(encoded, visible_ids, asked)[0].double()
        error = (prediction - method.targets(gather_tokens(patches, asked))[0].double()).square().mean(dim=1)
        weight = torch.tensor([weigh(x) for x in d[kept].tolist()], dtype=torch.float64)
        losses.append((weight * error).sum() / weight.sum())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("beta", ["null", "3", "6"])
def test_with_a_slot_for_every_patch_the_loss_is_that_of_the_threshold_alone(beta, exact):
    method = small(f"beta={beta}", "prediction_ratio=null", f"exact_distance={str(exact).lower()}")
    images, noise = batch(method)
    out = method(images, noise)
    threshold = None if beta == "null" else float(beta)
    expected = plain(method, images, noise, beta=threshold, exact=exact, weigh=lambda d: d**-0.6)
    assert abs(out.loss.item() - expected) < 1e-5
    assert out.predicted_ids.shape == (4, PATCHES - VISIBLE)


@settings(max_examples=25)
@given(st.sampled_from(["3", "6", "null"]), st.integers(1, 85), st.booleans(), st.integers(0, 10**6))
def test_with_fewer_slots_the_easiest_patches_under_the_threshold_are_predicted(beta, slots, exact, seed):
    method = small(f"beta={beta}", f"prediction_ratio={slots / PATCHES}", f"exact_distance={exact}".lower())
    images, noise = batch(method, 2, seed)
    out = method(images, noise)
    threshold = None if beta == "null" else float(beta)
    expected = plain(method, images, noise, beta=threshold, slots=slots, weigh=lambda d: d**-0.6, exact=exact)
    assert abs(out.loss.item() - expected) < 1e-5
    assert out.predicted_ids.shape == (2, slots)


def test_gradients_are_those_of_really_dropping_patches():
    method = small("beta=4", "prediction_ratio=null")
    images, noise = batch(method, 1)
    method(images, noise).loss.backward()
    packed = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    visible_ids, masked_ids = noise.argsort()[:, :VISIBLE], noise.argsort()[:, VISIBLE:]
    d = patch_distance(as_mask(visible_ids, PATCHES).view(1, GRID, GRID), 4).flatten(1).gather(1, masked_ids)
    asked, d = masked_ids[d <= 4][None], d[d <= 4]
    patches = patchify(images, 4)
    prediction = method.decoder(
        method.encoder(gather_tokens(patches, visible_ids), visible_ids), visible_ids, asked
    )
    error = (prediction - method.targets(gather_tokens(patches, asked))).square().mean(dim=2)[0]
    ((d**-0.6 * error).sum() / (d**-0.6).sum()).backward()
    assert all(torch.allclose(packed[name], p.grad, atol=1e-5) for name, p in method.named_parameters())


def test_a_prediction_ratio_of_150_in_196_is_table_8s_number():
    for name, slots in (("vitb16", 150), ("vitl16", 150), ("vith14", 196)):
        assert load_recipe(f"{name}_efficient_mae").num_predicted == slots


@pytest.mark.parametrize("metric", ["neighbors_3x3", "inverse_distance_5x5", "nearest_patch"])
def test_the_metrics_of_table_5_weigh_by_their_own_difficulty(metric):
    method = small("beta=null", "prediction_ratio=null", f"metric={metric}")
    images, noise = batch(method)
    expected = plain(method, images, noise, metric=metric, weigh=lambda d: d**-0.6)
    assert abs(method(images, noise).loss.item() - expected) < 1e-5


def test_thresholding_of_table_6_a_drops_but_does_not_weigh():
    method = small("scheduler=threshold", "beta=4", "prediction_ratio=null")
    images, noise = batch(method)
    expected = plain(method, images, noise, beta=4.0, weigh=lambda d: 1.0)
    assert abs(method(images, noise).loss.item() - expected) < 1e-5


@pytest.mark.parametrize(
    ("end", "done", "beta"),
    [
        ("6.5", 0.0, 2.25),  # 9 px at patch 16
        ("6.5", 0.5, 4.375),
        ("6.5", 1.0, 6.5),
        ("null", 0.0, 2.25),
        ("null", 0.5, 4.5),
        ("null", 1.0, float("inf")),  # "no additional restriction is imposed"
    ],
)
def test_scheduling_of_table_6_b_lets_harder_patches_in_as_training_goes_on(end, done, beta):
    method = small("scheduler=schedule", f"beta={end}", "prediction_ratio=null")
    method.set_training_progress(done)
    images, noise = batch(method)
    out = method(images, noise)
    visible = as_mask(out.visible_ids, PATCHES).view(4, GRID, GRID)
    d = patch_distance(visible, 4).flatten(1).gather(1, out.predicted_ids)
    assert out.metrics["decoded_patches"] == (d <= beta).float().sum(1).mean()
    if done == 1:
        expected = plain(method, images, noise, beta=beta, weigh=lambda d: 1.0)
        assert abs(out.loss.item() - expected) < 1e-5


def test_the_weights_of_table_6_c_are_ratios_of_counts():
    """Counted again, with other masks and one patch at a time."""
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


def test_normalisation_of_table_6_c_weighs_as_if_the_mask_ratio_were_maes():
    method = small("scheduler=normalize", "beta=null", "prediction_ratio=null")
    images, noise = batch(method)
    weights = method.interval_weights

    def weigh(d: float) -> float:
        return weights[interval(torch.tensor(d), 4)].item()

    assert abs(method(images, noise).loss.item() - plain(method, images, noise, weigh=weigh)) < 1e-5
    assert weights[2:4].min() > weights[7:].max()  # easy patches are rarer, hard ones commoner than in MAE


def test_reconstruction_predicts_the_hardest_patches_too():
    method = small()
    images, noise = batch(method)
    picture = method.reconstruct(images, noise)
    truth = patchify(images, 4)[:, None]
    assert picture.visible.shape == (4, 1, PATCHES) and picture.pixels.shape == (4, 1, PATCHES, 48)
    assert not torch.isclose(picture.pixels, truth).all(dim=-1)[~picture.visible].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mask_ratio=0.999"], "method.efficient_mae.mask_ratio: 0.999 leaves 0 of 100 patches visible"),
        (["metric=neighbors_3x3"], "method.efficient_mae.beta: a distance in pixels"),
        (["scheduler=threshold", "beta=null"], "method.efficient_mae.beta: the scheduler threshold needs"),
        (["scheduler=schedule", "beta=null", "metric=neighbors_3x3"], "schedule needs a distance in pixels"),
        (["scheduler=normalize", "beta=null", "metric=inverse_distance_5x5"], "normalize needs a distance"),
        (["gamma=1e3"], "method.efficient_mae.gamma"),
        (["scheduler=schedule", "beta=2.2"], "beta: 2.2 px .* it must be at least 2.25"),
        (["beta=2.4"], "beta: 2.4 px would leave next to no patch of 4 px .* at least 2.5"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        small(*options)
