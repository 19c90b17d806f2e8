"""Properties of every method: static graphs, no device synchronization, precision, batch independence."""

import pytest
import torch
from tiny_methods import VOCABULARY, HashTokenizer, random_batch, tiny_method
from torch._dynamo.testing import CompileCounter

from pipeline.masking import gather_tokens
from pipeline.methods import Method, MethodOutput, build_method, register_method
from pipeline.methods.targets import TokenTarget
from pipeline.recipe import load_recipe
from pipeline.train import engine

VARIANTS = {  # options of the method's own section, or of the section that they name
    "mae": "",
    "mae, block": "mask_sampling=block",
    "mae, grid": "mask_sampling=grid",
    "mae, mask tokens": "mask_tokens_in_encoder=true",
    "mae, pca": "target.name=pca target.components=8",
    "mae, hog": "target.name=hog",
    "emae": "",
    "emae, half decoded": "decode_share=0.5",
    "emae, all": "consistency_mean=all",
    "emae, flattened": "difficulty_flatten=true efficient_mae.beta=6",
    "emae, fewer": "difficulty_flatten=true efficient_mae.beta=6 efficient_mae.prediction_ratio=0.5",
    "efficient_mae": "beta=6",
    "efficient_mae, exact": "exact_distance=true beta=5",
    "efficient_mae, no threshold": "beta=null prediction_ratio=null",
    "efficient_mae, 3x3": "metric=neighbors_3x3 beta=null",
    "efficient_mae, 5x5": "metric=inverse_distance_5x5 beta=null",
    "efficient_mae, nearest": "metric=nearest_patch beta=6",
    "efficient_mae, threshold": "scheduler=threshold beta=4",
    "efficient_mae, schedule": "scheduler=schedule beta=null prediction_ratio=null",
    "efficient_mae, schedule to beta": "scheduler=schedule beta=6",
    "efficient_mae, normalize": "scheduler=normalize beta=6",
    "lomar": "",
    "lomar, flattened": "difficulty_flatten=true",
    "lomar, as released": "windows=as_released",
    "lomar, decoder": "decoder=true",
    "lomar, tokens": "target.name=tokens",
    "beit": "target.name=tokens",
    "beit, pixels": "",
}
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))
METHODS = ["mae", "emae", "efficient_mae", "lomar", "beit"]
every_method = pytest.mark.parametrize("variant", METHODS)


def small(variant: str, *more: str) -> Method:
    name = variant.partition(",")[0]
    options = [o if "." in o.partition("=")[0] else f"{name}.{o}" for o in VARIANTS[variant].split()]
    settings = [f"method.{option}" for option in ("lomar.window_size=4", *options)]
    if "name=tokens" in VARIANTS[variant]:
        settings += ["method.target.tokenizer=.", f"method.target.vocabulary={VOCABULARY}"]
    elif name == "beit":
        settings += ["method.target={name: normalized_pixels, tokenizer: null}"]
    if "hog" in variant:
        settings.append("model.patch_size=8")
    method = tiny_method(name, 32, "model.decoder_depth=1", *settings, *more)
    if isinstance(method.target, TokenTarget):
        method.target.tokenizer.codebook = HashTokenizer()
    if not any(p.is_meta for p in method.parameters()):
        method.target.fit(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    return method


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[] if v in METHODS else pytest.mark.soak) for v in VARIANTS])
def test_forward_is_one_static_graph_compiled_once(variant):
    torch._dynamo.reset()
    method = small(variant, "model.depth=1")
    backend = "aot_eager" if variant == "emae" else "eager"  # aot_eager traces the backward pass, and is slow
    compiled = torch.compile(method, backend=backend, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            method.set_training_progress(seed / 2)
            images, noise = random_batch(method, seed=seed)
            out = compiled(images, noise)
            out.loss.backward()
            assert torch.allclose(out.loss, method(images, noise).loss, atol=1e-6)


@pytest.mark.parametrize(("variant", "graphs"), [("emae", 4), ("lomar", 1)])
def test_blocks_share_graphs_and_pictures_compile_none(variant, graphs):
    """The encoder's blocks have one graph; the decoder's first, middle and last ones one each."""
    torch._dynamo.reset()
    recipe = load_recipe("demo_emae", ["engine.compile=true"])
    method = small(variant, "model.depth=3", "model.decoder_depth=4")
    expected = method(*random_batch(method)).loss
    counter = CompileCounter()
    engine.compile_blocks(method, counter)
    for seed in range(2):
        images, noise = random_batch(method, seed=5 + seed)
        loss = method(images, noise).loss
        loss.backward()
        if not seed:
            assert torch.allclose(loss, expected, atol=1e-6)
    assert counter.frame_count == graphs
    with engine.without_compilation(recipe):
        method.reconstruct(*random_batch(method, 1))
        method.forward_features(images[:2])
    method(*random_batch(method)).loss.backward()
    assert counter.frame_count == graphs


@every_variant
def test_a_step_never_synchronizes_with_the_device(variant):
    """`.item()`, `nonzero` and data-dependent shapes raise on the meta device, which has no values."""
    with torch.device("meta"):
        method = small(variant)
        out = method(torch.empty(2, 3, 32, 32), torch.empty(2, method.noise_size))
    out.loss.backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lomar, as released"])
def test_an_images_loss_does_not_depend_on_its_batch(variant):
    method = small(variant)
    images, noise = random_batch(method, 4)
    loss = method(images, noise).loss
    per_image = torch.stack([method(images[i : i + 1], noise[i : i + 1]).loss for i in range(4)])
    assert torch.allclose(loss, per_image.mean(), atol=1e-6)


@every_method
def test_images_of_another_size_raise(variant):
    method = small(variant)
    images = torch.zeros(2, 3, 36, 36)
    for call in (lambda: method(images, torch.rand(2, method.noise_size)), lambda: method.forward_features(images)):
        with pytest.raises(ValueError, match=r"images: .*\(2, 3, 36, 36\)"):
            call()


@every_variant
def test_in_bf16_targets_and_losses_stay_fp32(variant):
    method = small(variant)
    method.set_training_progress(0.3)
    exact = method(*random_batch(method))
    method = small(variant).bfloat16()
    method.set_training_progress(0.3)
    rounded = method(*random_batch(method))
    assert rounded.loss.dtype == rounded.prediction.dtype == torch.float32
    assert rounded.target.dtype == (torch.int64 if "name=tokens" in VARIANTS[variant] else torch.float32)
    assert torch.equal(rounded.target, exact.target)
    assert torch.equal(rounded.predicted_ids, exact.predicted_ids)
    assert abs(rounded.loss - exact.loss) < 0.02 * exact.loss


@pytest.mark.parametrize("variant", [name for name, options in VARIANTS.items() if "target" not in options])
def test_targets_are_the_normalized_patches_at_predicted_ids(variant):
    method = small(variant)
    images, noise = random_batch(method)
    out = method(images, noise)
    selected = gather_tokens(method.patchify(images), out.predicted_ids.flatten(1))
    variance, mean = torch.var_mean(selected, dim=-1, keepdim=True)
    expected = (selected - mean) / (variance + 1e-6).sqrt()
    assert torch.allclose(out.target.view(expected.shape), expected, atol=1e-5)


@every_variant
def test_every_parameter_gets_a_gradient_only_from_the_loss(variant):
    method = small(variant)
    out = method(*random_batch(method))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert not any(t.requires_grad for t in [*out[1:5], *out.metrics.values()])
    assert all(value.ndim == 0 and value.isfinite() for value in out.metrics.values())


@every_method
def test_activation_checkpointing_changes_no_gradient(variant):
    plain, checkpointed = small(variant), small(variant, "engine.activation_checkpointing=true")
    for method in (plain, checkpointed):
        method(*random_batch(method)).loss.backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in pairs)


@every_method
def test_outputs_can_be_rebuilt_as_zero_3_does(variant):
    """ZeRO-3 passes every tensor of an output through a function and rebuilds the output."""
    method = small(variant)
    out = method(*random_batch(method))

    def rebuild(value):
        if isinstance(value, tuple):
            return value.__class__(*(rebuild(part) for part in value))
        if isinstance(value, dict):
            return {key: rebuild(part) for key, part in value.items()}
        assert isinstance(value, torch.Tensor)
        return value.view_as(value)

    rebuilt = rebuild(out)
    assert isinstance(rebuilt, MethodOutput)
    rebuilt.loss.backward()


@every_method
def test_each_method_overfits_one_batch(variant):
    method = small(variant)
    images, noise = random_batch(method)
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(60 if variant == "beit" else 25):
        loss = method(images, noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_method_name_is_registered_once():
    with pytest.raises(ValueError, match="method mae: already registered by MAE"):
        register_method("mae")(Method)
    recipe = load_recipe("vitb16_mae")
    unknown = recipe.model_copy(update={"method": recipe.method.model_copy(update={"name": "beit3"})})
    with pytest.raises(ValueError, match=r"method\.name: beit3 is not registered"):
        build_method(unknown)
