"""What holds for every method: static graphs, no waiting, precision, independence of the batch, learning."""

import pytest
import torch

from pipeline.methods import build_method
from pipeline.methods.method import MethodOutput
from pipeline.recipe import load_recipe

SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.patch_size=4",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "data.image_size=32",
    "method.lomar.window_size=4",
)
EFFICIENT = "method.efficient_mae."
VARIANTS = {
    "mae": (),
    "emae": (),
    "emae, half decoded": ("method.emae.decode_share=0.5",),
    "emae, flattened": ("method.emae.difficulty_flatten=true", EFFICIENT + "beta=6"),
    "efficient_mae": (EFFICIENT + "beta=6",),
    "emae, flattened, fewer slots": (
        "method.emae.difficulty_flatten=true",
        EFFICIENT + "beta=6",
        EFFICIENT + "prediction_ratio=0.5",
    ),
    "efficient_mae, exact": (EFFICIENT + "exact_distance=true", EFFICIENT + "beta=5"),
    "efficient_mae, no threshold": (EFFICIENT + "beta=null", EFFICIENT + "prediction_ratio=null"),
    "efficient_mae, 3x3": (EFFICIENT + "metric=neighbors_3x3", EFFICIENT + "beta=null"),
    "efficient_mae, 5x5": (EFFICIENT + "metric=inverse_distance_5x5", EFFICIENT + "beta=null"),
    "efficient_mae, nearest": (EFFICIENT + "metric=nearest_patch", EFFICIENT + "beta=6"),
    "efficient_mae, threshold": (EFFICIENT + "scheduler=threshold", EFFICIENT + "beta=4"),
    "efficient_mae, schedule": (
        EFFICIENT + "scheduler=schedule",
        EFFICIENT + "beta=null",
        EFFICIENT + "prediction_ratio=null",
    ),
    "efficient_mae, schedule to beta": (EFFICIENT + "scheduler=schedule", EFFICIENT + "beta=6"),
    "efficient_mae, normalize": (EFFICIENT + "scheduler=normalize", EFFICIENT + "beta=6"),
    "lomar": (),
    "lomar, flattened": ("method.lomar.difficulty_flatten=true",),
}
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def small(variant: str, *more: str):
    torch.manual_seed(0)
    name = variant.partition(",")[0]
    return build_method(load_recipe(f"vitb16_{name}", [*SMALL, *VARIANTS[variant], *more]))


def batch(method, size: int = 3, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 32, 32, generator=generator),
        torch.rand(size, method.noise_size, generator=generator),
    )


@every_variant
def test_the_forward_pass_is_one_static_graph_and_compiled_once(variant):
    torch._dynamo.reset()
    method = small(variant)
    backend = "aot_eager" if variant == "emae" else "eager"  # the first traces the backward pass, and is slow
    compiled = torch.compile(method, backend=backend, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            method.set_training_progress(seed / 2)
            images, noise = batch(method, seed=seed)
            out = compiled(images, noise)
            out.loss.backward()
            assert torch.allclose(out.loss, method(images, noise).loss, atol=1e-6)


@every_variant
def test_a_step_never_asks_for_a_value(variant):
    """On the meta device there are none: `.item()`, `nonzero` or a shape that depends on values raises."""
    with torch.device("meta"):
        method = small(variant)
        out = method(torch.empty(2, 3, 32, 32), torch.empty(2, method.noise_size))
    out.loss.backward()
    assert all(p.grad is not None for p in method.parameters())


@every_variant
def test_an_images_loss_does_not_depend_on_its_batch(variant):
    method = small(variant)
    images, noise = batch(method, 4)
    whole = method(images, noise).loss
    cut = torch.stack([method(images[i : i + 1], noise[i : i + 1]).loss for i in range(4)]).mean()
    assert torch.allclose(whole, cut, atol=1e-6)


@pytest.mark.parametrize("variant", ["mae", "emae", "efficient_mae", "lomar"])
def test_images_of_another_size_are_refused(variant):
    method = small(variant)
    images = torch.zeros(2, 3, 36, 36)
    for use in (lambda: method(images, torch.rand(2, method.noise_size)), lambda: method.tokens(images)):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 36, 36\): expected \(B, 3, 32, 32\)"):
            use()


@every_variant
def test_in_bf16_targets_and_losses_stay_fp32(variant):
    method = small(variant)
    method.set_training_progress(0.3)
    exact = method(*batch(method))
    method = small(variant).bfloat16()
    method.set_training_progress(0.3)
    rounded = method(*batch(method))
    assert rounded.loss.dtype == rounded.target.dtype == torch.float32
    assert torch.equal(rounded.target, exact.target) and torch.equal(
        rounded.predicted_ids, exact.predicted_ids
    )
    assert abs(rounded.loss - exact.loss) < 0.02 * exact.loss


@every_variant
def test_every_parameter_gets_a_finite_gradient_and_only_the_loss_gives_one(variant):
    method = small(variant)
    out = method(*batch(method))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert not any(t.requires_grad for t in [*out[1:5], *out.metrics.values()])
    assert all(value.ndim == 0 and value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("variant", ["mae", "emae", "efficient_mae", "lomar"])
def test_checkpointing_changes_nothing_but_memory(variant):
    plain, saving = small(variant), small(variant, "engine.activation_checkpointing=true")
    for method in (plain, saving):
        method(*batch(method)).loss.backward()
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("variant", ["mae", "emae", "efficient_mae", "lomar"])
def test_outputs_survive_being_taken_apart_and_rebuilt(variant):
    """ZeRO-3 passes every tensor of an output through a function and puts the output together again."""
    method = small(variant)
    out = method(*batch(method))

    def rebuild(value):
        if isinstance(value, tuple):
            return value.__class__(*(rebuild(part) for part in value))
        if isinstance(value, dict):
            return {key: rebuild(part) for key, part in value.items()}
        assert isinstance(value, torch.Tensor)
        return value.view_as(value)

    again = rebuild(out)
    assert isinstance(again, MethodOutput)
    again.loss.backward()


@pytest.mark.parametrize("variant", ["mae", "emae", "efficient_mae", "lomar"])
def test_each_method_learns_to_paint_one_picture(variant):
    method = small(variant)
    images, noise = batch(method)
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = method(images, noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
