"""EMAE: parts, loss and consistency against the plain definition, part by part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.difficulty import patch_distance
from pipeline.losses import patch_error, patchify, self_consistency_loss
from pipeline.masking import as_mask, gather_tokens
from pipeline.methods import build_method
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "data.image_size=24",
)


def small_emae(*more: str):
    torch.manual_seed(0)
    return build_method(load_recipe("vitb16_emae", [*SMALL, *more]))


def batch(method, size: int = 3, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 24, 24, generator=generator),
        torch.rand(size, method.noise_size, generator=generator),
    )


def spread(out, length: int) -> torch.Tensor:
    """Predictions at their positions, (B, K, L, D); NaN where nothing was predicted."""
    b, k, _, d = out.prediction.shape
    whole = torch.full((b, k, length, d), float("nan"))
    return whole.scatter(2, out.predicted_ids[..., None].expand(-1, -1, -1, d), out.prediction)


@settings(max_examples=25)
@given(st.sampled_from([2, 3, 4, 6, 9]), st.sampled_from(["l1", "l2", "smooth_l1"]), st.integers(0, 10**6))
def test_the_loss_is_the_plain_definitions(num_parts, kind, seed):
    method = small_emae(
        f"method.emae.num_parts={num_parts}",
        f"method.emae.consistency_kind={kind}",
        "method.emae.consistency_weight=0.5",
    )
    images, noise = batch(method, seed=seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    reconstruction, everything = [], []
    for k in range(num_parts):  # each part alone, as if it were an MAE of its own
        visible = noise.argsort(dim=1)[:, k * 36 // num_parts : (k + 1) * 36 // num_parts]
        encoded = method.encoder(gather_tokens(patches, visible), visible)
        prediction = method.decoder(encoded, visible, torch.arange(36).expand(3, 36))
        masked_ids = torch.stack([torch.tensor(sorted(set(range(36)) - set(v.tolist()))) for v in visible])
        encoded_alone = method.decoder(encoded, visible, masked_ids)
        target = method.targets(gather_tokens(patches, masked_ids))
        reconstruction.append(patch_error(encoded_alone, target).mean())
        everything.append(prediction.scatter(1, masked_ids[..., None].expand(-1, -1, 48), encoded_alone))
    masked = ~as_mask(out.visible_ids, 36)
    consistency = self_consistency_loss(torch.stack(everything, dim=1), masked, kind)
    expected = torch.stack(reconstruction).mean() + 0.5 * consistency
    assert torch.allclose(out.loss, expected, atol=1e-5)
    assert torch.allclose(out.metrics["consistency"], consistency, atol=1e-5)
    assert (consistency > 0) == (num_parts > 2)


@settings(max_examples=25)
@given(st.sampled_from(["4", "6", "null"]), st.integers(1, 27), st.integers(0, 10**6))
def test_flattened_it_is_efficient_mae_on_each_part_of_what_has_a_slot(beta, slots, seed):
    method = small_emae(
        "method.emae.difficulty_flatten=true",
        "method.emae.consistency_weight=0.5",
        f"method.efficient_mae.beta={beta}",
        f"method.efficient_mae.prediction_ratio={slots / 36}",
    )
    images, noise = batch(method, seed=seed)
    out = method(images, noise)
    patches = patchify(images, 4)
    predicted = torch.zeros(3, 4, 36, dtype=torch.bool)
    everything = torch.zeros(3, 4, 36, 48)
    losses = []
    for b in range(3):
        for k in range(4):
            visible = noise[b].argsort()[k * 9 : (k + 1) * 9]
            d = patch_distance(as_mask(visible, 36).view(1, 6, 6), 4).flatten()
            hidden = (
                noise[b].argsort().roll(-(k + 1) * 9).tolist()[:27]
            )  # equally hard: the next parts' first
            kept = sorted(hidden, key=lambda i: round(d[i].item() * 1024))[:slots]
            kept = [i for i in kept if beta == "null" or d[i] <= float(beta)]
            one, asked = patches[b : b + 1], torch.tensor(kept)[None]
            encoded = method.encoder(gather_tokens(one, visible[None]), visible[None])
            prediction = method.decoder(encoded, visible[None], asked)
            error = patch_error(prediction, method.targets(gather_tokens(one, asked)))[0].double()
            weight = d[kept].double() ** -0.6
            losses.append((weight * error).sum() / weight.sum())
            predicted[b, k, kept], everything[b, k, kept] = True, prediction[0]
    consistency = self_consistency_loss(everything, predicted)
    expected = torch.stack(losses).mean() + 0.5 * consistency
    assert out.predicted_ids.shape == (3, 4, slots)
    assert abs(out.loss.item() - expected.item()) < 1e-5
    assert abs(out.metrics["consistency"].item() - consistency.item()) < 1e-5


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
def test_the_packed_consistency_is_the_contracts_function(kind):
    method = small_emae(f"method.emae.consistency_kind={kind}")
    out = method(*batch(method))
    masked = ~as_mask(out.visible_ids, 36)
    assert torch.allclose(out.metrics["consistency"], self_consistency_loss(spread(out, 36), masked, kind))


def test_every_part_predicts_exactly_what_it_did_not_see():
    method = small_emae()
    out = method(*batch(method))
    assert torch.equal(as_mask(out.predicted_ids, 36), ~as_mask(out.visible_ids, 36))
    assert out.prediction.shape == out.target.shape == (3, 4, 27, 48)


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.1, 1), (0.01, 1)])
def test_a_share_of_the_positions_is_the_same_for_all_parts_that_miss_them(share, count):
    method = small_emae(f"method.emae.decode_share={share}")
    out = method(*batch(method))
    assert out.predicted_ids.shape == (3, 4, 3 * count)
    predictors = as_mask(out.predicted_ids, 36).sum(dim=1)
    assert set(predictors.unique().tolist()) == {0, 3}  # by nobody, or by the three parts that do not see it
    everything = small_emae()(*batch(method))
    masked = as_mask(out.predicted_ids, 36)
    assert torch.allclose(
        out.metrics["consistency"], self_consistency_loss(spread(out, 36).nan_to_num(), masked)
    )
    assert abs(out.loss - everything.loss) < 0.2 * everything.loss


def test_targets_belong_to_the_positions_they_are_compared_with():
    method = small_emae()
    images, noise = batch(method)
    out = method(images, noise)
    patches = patchify(images, 4)
    for k in range(4):
        assert torch.allclose(
            out.target[:, k], method.targets(gather_tokens(patches, out.predicted_ids[:, k]))
        )


def test_a_part_sees_nothing_of_the_others():
    method = small_emae()
    images, noise = batch(method, 1)
    out = method(images, noise)
    patches = patchify(images, 4)
    changed = patches.clone()
    changed[0, out.visible_ids[0, 1:].flatten()] = 7.0
    rows = changed.view(1, 6, 6, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 24, 24)
    assert torch.allclose(method(rows, noise).prediction[0, 0], out.prediction[0, 0], atol=1e-6)


def test_reconstruction_shows_every_part_whole_even_with_a_decode_share():
    method = small_emae("method.emae.decode_share=0.3")
    images, noise = batch(method)
    picture = method.reconstruct(images, noise)
    assert picture.visible.shape == (3, 4, 36) and picture.pixels.shape == (3, 4, 36, 48)
    assert (picture.visible.sum(dim=1) == 1).all()  # every patch is seen by exactly one part
    truth = patchify(images, 4)[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(picture.pixels[picture.visible], truth[picture.visible])
    assert not torch.isclose(picture.pixels[~picture.visible], truth[~picture.visible]).all(dim=-1).any()
