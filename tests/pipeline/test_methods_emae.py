"""EMAE against its plain definition, part by part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_methods import random_batch, tiny_method, unpatchify

from pipeline.difficulty import patch_distance
from pipeline.losses import patch_error, patchify, self_consistency_loss
from pipeline.masking import as_mask, gather_tokens


def small_emae(*more: str):
    return tiny_method("emae", 24, "model.decoder_depth=1", *more)


def scatter_predictions(out, length: int) -> torch.Tensor:
    """Put predictions at their positions, (B, K, L, D); NaN where nothing was predicted."""
    b, k, _, d = out.prediction.shape
    full = torch.full((b, k, length, d), float("nan"))
    return full.scatter(2, out.predicted_ids[..., None].expand(-1, -1, -1, d), out.prediction)


@settings(max_examples=25)
@given(
    st.sampled_from([2, 3, 4, 6, 9]),
    st.sampled_from(["l1", "l2", "smooth_l1"]),
    st.sampled_from(["overlap", "all"]),
    st.integers(0, 10**6),
)
def test_loss_equals_the_plain_definition(num_parts, kind, mean, seed):
    method = small_emae(
        f"method.emae.num_parts={num_parts}",
        f"method.emae.consistency_kind={kind}",
        f"method.emae.consistency_mean={mean}",
        "method.emae.consistency_weight=0.5",
    )
    images, noise = random_batch(method, seed=seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    reconstruction, predictions = [], []
    for k in range(num_parts):  # each part alone, as in MAE
        visible = noise.argsort(dim=1, stable=True)[:, k * 36 // num_parts : (k + 1) * 36 // num_parts]
        encoded = method.encoder(gather_tokens(patches, visible), visible)
        masked_ids = torch.stack([torch.tensor(sorted(set(range(36)) - set(v.tolist()))) for v in visible])
        prediction = method.decoder(encoded, visible, masked_ids)
        reconstruction.append(patch_error(prediction, method.make_targets(patches, masked_ids)).mean())
        full = torch.full((3, 36, 48), float("nan"))
        predictions.append(full.scatter(1, masked_ids[..., None].expand(-1, -1, 48), prediction))
    masked = ~as_mask(out.visible_ids, 36)
    consistency = self_consistency_loss(torch.stack(predictions, dim=1), masked, kind, mean)
    expected = torch.stack(reconstruction).mean() + 0.5 * consistency
    assert torch.allclose(out.loss, expected, atol=1e-5)
    assert torch.allclose(out.metrics["consistency"], consistency, atol=1e-5)
    assert (consistency > 0) == (num_parts > 2)


@settings(max_examples=25)
@given(st.sampled_from(["4", "6", "null"]), st.integers(1, 27), st.integers(0, 10**6))
def test_difficulty_flatten_is_efficient_mae_on_each_part(beta, num_predicted, seed):
    method = small_emae(
        "method.emae.difficulty_flatten=true",
        "method.emae.consistency_weight=0.5",
        f"method.efficient_mae.beta={beta}",
        f"method.efficient_mae.prediction_ratio={num_predicted / 36}",
    )
    images, noise = random_batch(method, seed=seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    predicted = torch.zeros(3, 4, 36, dtype=torch.bool)
    predictions = torch.zeros(3, 4, 36, 48)
    losses = []
    for b in range(3):
        for k in range(4):
            order = noise[b].argsort(stable=True)
            visible = order[k * 9 : (k + 1) * 9]
            d = patch_distance(as_mask(visible, 36).view(1, 6, 6), 4).flatten()
            masked = order.roll(-(k + 1) * 9).tolist()[:27]  # of equally hard patches the next part's first
            kept = sorted(masked, key=lambda i: round(d[i].item() * 1024))[:num_predicted]
            kept = [i for i in kept if beta == "null" or d[i] <= float(beta)]
            image, kept_ids = patches[b : b + 1], torch.tensor(kept)[None]
            encoded = method.encoder(gather_tokens(image, visible[None]), visible[None])
            prediction = method.decoder(encoded, visible[None], kept_ids)
            error = patch_error(prediction, method.make_targets(image, kept_ids))[0].double()
            weight = d[kept].double() ** -0.6
            losses.append((weight * error).sum() / weight.sum())
            predicted[b, k, kept], predictions[b, k, kept] = True, prediction[0]
    consistency = self_consistency_loss(predictions, predicted)
    expected = torch.stack(losses).mean() + 0.5 * consistency
    assert out.predicted_ids.shape == (3, 4, num_predicted)
    assert abs(out.loss.item() - expected.item()) < 1e-5
    assert abs(out.metrics["consistency"].item() - consistency.item()) < 1e-5


@settings(max_examples=10)
@given(st.sampled_from([3, 4, 6]), st.sampled_from(["1.0", "0.5"]), st.integers(0, 10**6))
def test_mean_over_all_patches_scales_the_gradient(num_parts, share, seed):
    """The third-party code's gradient is (K - 2) / K of ours, half at K = 4."""
    gradients = {}
    for mean in ("overlap", "all"):
        options = f"consistency_mean={mean}", f"num_parts={num_parts}", f"decode_share={share}"
        method = small_emae(*(f"method.emae.{option}" for option in options))
        images, noise = random_batch(method, seed=seed)
        method(images, noise).loss.backward()
        both = method.decoder.pred.weight.grad.clone()
        method.zero_grad()
        method.consistency_weight = 0.0
        method(images, noise).loss.backward()
        gradients[mean] = both - method.decoder.pred.weight.grad
    decoded = method.num_decoded / (36 // num_parts)
    factor = (num_parts - 2) / num_parts * decoded
    assert torch.allclose(gradients["all"], factor * gradients["overlap"], atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
def test_packed_consistency_equals_self_consistency_loss(kind):
    method = small_emae(f"method.emae.consistency_kind={kind}")
    out = method(*random_batch(method))
    expected = self_consistency_loss(scatter_predictions(out, 36), ~as_mask(out.visible_ids, 36), kind)
    assert torch.allclose(out.metrics["consistency"], expected)


def test_every_part_predicts_exactly_its_masked_patches():
    method = small_emae()
    out = method(*random_batch(method))
    assert torch.equal(as_mask(out.predicted_ids, 36), ~as_mask(out.visible_ids, 36))
    assert out.prediction.shape == out.target.shape == (3, 4, 27, 48)


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.1, 1), (0.01, 1)])
def test_decode_share_selects_the_same_patches_for_all_parts(share, count):
    method = small_emae(f"method.emae.decode_share={share}")
    out = method(*random_batch(method))
    assert out.predicted_ids.shape == (3, 4, 3 * count)
    masked = as_mask(out.predicted_ids, 36)
    # Predicted by no part, or by all three parts in which it is masked.
    assert set(masked.sum(dim=1).unique().tolist()) == {0, 3}
    expected = self_consistency_loss(scatter_predictions(out, 36), masked)
    assert torch.allclose(out.metrics["consistency"], expected)
    full = small_emae()(*random_batch(method))
    assert abs(out.loss - full.loss) < 0.2 * full.loss


def test_a_part_sees_no_patch_of_other_parts():
    method = small_emae()
    images, noise = random_batch(method, 1)
    out = method(images, noise)
    changed = patchify(images, 4).clone()
    changed[0, out.visible_ids[0, 1:].flatten()] = 7.0
    prediction = method(unpatchify(changed), noise).prediction
    assert torch.allclose(prediction[0, 0], out.prediction[0, 0], atol=1e-6)


def test_reconstruction_ignores_decode_share():
    method = small_emae("method.emae.decode_share=0.3")
    images, noise = random_batch(method)
    visible, pixels = method.reconstruct(images, noise)
    assert visible.shape == (3, 4, 36) and pixels.shape == (3, 4, 36, 48)
    assert (visible.sum(dim=1) == 1).all()  # each patch is visible in exactly one part
    truth = patchify(images, 4)[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(pixels[visible], truth[visible])
    assert not torch.isclose(pixels[~visible], truth[~visible]).all(dim=-1).any()
