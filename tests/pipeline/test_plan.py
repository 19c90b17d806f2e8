"""The estimates of `plan`, compared with the papers' figures and with counts by hand."""

import json
import re
import shlex
from dataclasses import asdict

import pytest
import torch

from pipeline.__main__ import main
from pipeline.distributed.hardware import GPUS
from pipeline.errors import UserError
from pipeline.estimate import activation_memory
from pipeline.estimate.activation_memory import activation_bytes
from pipeline.estimate.memory import OVERHEAD_GIB
from pipeline.estimate.plan import format_plan, plan
from pipeline.methods import build_method, flops
from pipeline.methods.flops import forward_flops
from pipeline.recipe import load_recipe
from tests.documentation import PAGES

TABLE_3 = {  # "Efficient MAE towards Large-Scale Vision Transformers", 10^9 multiply-adds per image
    "vitb16_mae": 9.8,
    "vitl16_mae": 20.8,
    "vith14_mae": 48.6,
    "vitb16_efficient_mae": 7.6,
    "vitl16_efficient_mae": 14.1,
    "vith14_efficient_mae": 31.3,
}


@pytest.mark.parametrize("name", list(TABLE_3))
def test_a_forward_pass_costs_at_most_table_3(name):
    ours = forward_flops(load_recipe(name)) / 2e9
    assert 0.96 * TABLE_3[name] <= ours <= TABLE_3[name]


def test_high_resolution_costs_are_the_references():
    """41.6 (large batch) to 42.2 (one image) for MAE, 17.4 for LoMaR at every image size."""
    mae = [forward_flops(load_recipe("vitb16_mae_448"), batch) / 2e9 for batch in (1024, 1)]
    assert [round(gmacs, 1) for gmacs in mae] == [41.6, 42.2]
    lomar = [forward_flops(load_recipe(name), 64) / 2e9 for name in ("vitb16_lomar", "vitb16_lomar_448")]
    assert lomar[0] == lomar[1] and round(lomar[0], 1) == 17.4


def test_plan_shows_decoder_slots_and_published_speed():
    efficient = plan(load_recipe("vitl16_efficient_mae"))
    assert (efficient.masked_patches, efficient.decoder_slots) == (167, 150)
    assert efficient.mean_kept_patches == pytest.approx(150.2, abs=0.7)
    assert re.search(r"decoder slots +150 of 167 masked patches", format_plan(efficient))
    assert "published" in format_plan(efficient) and round(efficient.published_mfu, 2) == 0.16
    mae = plan(load_recipe("vitl16_mae"))
    assert (mae.published_minutes, round(mae.published_mfu, 2), mae.decoder_slots) == (12.1, 0.17, None)
    for name in ("vitl16_lomar", "vitb16_mae_448"):
        assert plan(load_recipe(name)).published_mfu is None


def test_mae_costs_the_sum_of_its_layers():
    tokens, width, depth, decoder_tokens, narrow = 50, 768, 12, 197, 512
    encoder = depth * (12 * width**2 * tokens + 2 * tokens**2 * width) + 49 * 768 * width
    decoder = 8 * (12 * narrow**2 * decoder_tokens + 2 * decoder_tokens**2 * narrow) + tokens * width * narrow
    head = 147 * narrow * 768
    # The last block omits 9 of its 12 products and the attention of queries that are not predicted. The first
    # block's 3 products run once per batch, for all 196 positions instead of each image's 147.
    saved = 9 * narrow**2 * tokens + 2 * tokens * decoder_tokens * narrow - 3 * narrow**2 * 49
    assert forward_flops(load_recipe("vitb16_mae")) == 2 * (encoder + decoder + head - saved)


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("mae", "false"), ("emae", "true"), ("lomar", "false"), ("beit", "true")]
)
def test_costs_of_deep_encoders_are_those_of_all_their_blocks(name, checkpointing):
    settings = [f"model.depth={flops.MIN_EXTRAPOLATED_DEPTH}", "model.width=64", "model.heads=4"]
    settings += ["model.decoder_depth=2", "data.image_size=128", "engine.micro_batch=1"]
    settings += [f"engine.activation_checkpointing={checkpointing}"]
    recipe = load_recipe(f"vitb16_{name}", settings)
    assert forward_flops(recipe) == flops._forward_flops(recipe, 1, build_method)
    assert activation_bytes(recipe) == activation_memory._activation_bytes(recipe, build_method)


@pytest.mark.parametrize("batch", [2, 64])
def test_images_share_the_work_that_a_batch_needs_once(batch):
    recipe = load_recipe("vitb16_mae")
    once = 2 * 3 * 196 * 512**2  # queries, keys and values of the decoder's first block, at every position
    saved = forward_flops(recipe) - forward_flops(recipe, batch)
    assert saved == pytest.approx(once * (1 - 1 / batch), rel=1e-9)


def test_a_part_of_emae_costs_at_most_an_image_of_mae():
    image = forward_flops(load_recipe("vitl16_mae"))
    part = forward_flops(load_recipe("vitl16_emae")) / 4
    assert part <= image * 1.0001
    assert forward_flops(load_recipe("vitl16_emae", ["method.emae.decode_share=0.5"])) / 4 < 0.9 * image


def test_parameters_are_those_of_the_method():
    for name in ("vitb16_mae", "vitb16_lomar"):
        recipe = load_recipe(name)
        method = build_method(recipe)
        assert plan(recipe).parameters == sum(p.numel() for p in method.parameters())


def test_time_is_flops_over_speed():
    recipe = load_recipe("vitl16_mae", ["engine.micro_batch=64"])
    result = plan(recipe, gpus=4, nodes=2, gpu="a100", mfu=0.5)
    step = 3 * forward_flops(recipe, 64)
    assert result.step_gflops == pytest.approx(step / 1e9)
    assert result.images_per_s == pytest.approx(8 * 0.5 * 312e12 / step)
    assert result.steps == 500_456  # 1600 x 1,281,167 / 4096, rounded up
    assert result.hours == pytest.approx(result.steps * 4096 / result.images_per_s / 3600)
    assert result.gpu_hours == pytest.approx(8 * result.hours) and result.accumulation == 8
    assert plan(recipe, gpus=4, nodes=2, gpu="a100", mfu=0.25).hours == pytest.approx(2 * result.hours)


def test_each_zero_stage_shards_one_more_state():
    result = plan(load_recipe("vith14_mae"), gpus=8)
    n, gib = result.parameters, 2**30
    expected = [18 * n, (2 + 4 + 2 + 12 / 8) * n, (2 + 16 / 8) * n, 18 / 8 * n]
    assert [m.states * gib for m in result.memory[:4]] == pytest.approx(expected)
    largest = [m.largest_micro_batch for m in result.memory[:4]]
    assert largest == sorted(largest)


def test_offload_moves_the_optimizer_and_the_ema_to_the_host():
    plain, with_ema = (
        plan(load_recipe("vith14_mae", ["engine.zero_stage=2", *overrides]), gpus=8)
        for overrides in ([], ["train.ema_decay=0.9999"])
    )
    n, gib = plain.parameters, 2**30
    offloaded = {m.zero_stage: m for m in plain.memory if m.offload == "optimizer"}
    assert [offloaded[stage].states * gib for stage in (2, 3)] == pytest.approx([(2 + 4 / 8) * n, 2 / 8 * n])
    assert offloaded[2].host * gib == pytest.approx(16 / 8 * n)
    ema = [(b.states - a.states) * gib for a, b in zip(plain.memory, with_ema.memory, strict=True)]
    assert ema == pytest.approx([4 * n, 4 / 8 * n, 4 / 8 * n, 4 / 8 * n, 0, 0])
    assert with_ema.checkpoint_gib == pytest.approx(1.5 * plain.checkpoint_gib)


@pytest.mark.parametrize("name", ["vitb16_mae", "vitb16_lomar"])
def test_activations_are_what_autograd_saves(name):
    small = ["model.depth=3", "model.width=64", "model.heads=4", "engine.precision=fp32"]
    recipe = load_recipe(name, [*small, "model.decoder_width=32", "model.decoder_heads=4"])
    method = build_method(recipe)
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}

    def saved_bytes(batch: int) -> int:
        storages = {}

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        images, noise = torch.rand(batch, 3, 224, 224), torch.rand(batch, method.noise_size)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            method(images, noise)
        return sum(storage.nbytes() for storage in storages.values())

    assert activation_bytes(recipe) == pytest.approx(saved_bytes(5) - saved_bytes(4), rel=0.03)


def test_activation_checkpointing_costs_a_forward_pass():
    recipe = load_recipe("vitl16_mae", ["engine.micro_batch=64"])
    checkpointing = recipe.engine.model_copy(update={"activation_checkpointing": True})
    plain, checkpointed = plan(recipe), plan(recipe.model_copy(update={"engine": checkpointing}))
    assert checkpointed.memory[0].activations < 0.2 * plain.memory[0].activations
    assert checkpointed.step_gflops == pytest.approx(4 / 3 * plain.step_gflops)
    assert checkpointed.images_per_s == pytest.approx(0.75 * plain.images_per_s)


@pytest.mark.parametrize(("nodes", "micro_batch"), [(32, 16), (64, 8)])
def test_the_micro_batch_is_limited_to_the_gpus_share(nodes, micro_batch):
    result = plan(load_recipe("vitb16_emae", ["engine.micro_batch=16"]), gpus=8, nodes=nodes)
    assert (result.micro_batch, result.accumulation) == (micro_batch, 1)
    assert (f"--set engine.micro_batch={micro_batch}" in format_plan(result)) == (micro_batch < 16)
    overridden = load_recipe("vitb16_emae", [f"engine.micro_batch={micro_batch}"])
    assert plan(overridden, gpus=8, nodes=nodes).memory == result.memory


def test_memory_counts_what_the_loader_holds_on_the_gpu():
    few, many = (plan(load_recipe("vitb16_mae", [f"engine.micro_batch={n}"])).memory[1] for n in (64, 512))
    pixels = 3 * 224**2 * 4 / 2**30
    assert many.loader - few.loader > 448 * 7 * pixels  # three batches decoded ahead, and four on their way
    assert few.loader > 64 / 448 * (many.loader - few.loader) + 0.02  # DALI's preallocation
    for memory in (few, many):
        assert memory.total == pytest.approx(OVERHEAD_GIB + memory.states + memory.activations + memory.loader)


def test_every_documented_plan_command_succeeds(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    texts = [capsys.readouterr().out, *(page.read_text() for page in PAGES)]
    examples = set(re.findall(r"-m pipeline (plan vit[^`\n#|\\]*)", "\n".join(texts)))
    assert len(examples) >= 4
    for example in examples:
        assert main(shlex.split(example)) == 0, example


def test_json_round_trips_and_the_text_has_the_main_figures():
    result = plan(load_recipe("vitb16_emae"), samples=1000, shards=16)
    tree = json.loads(json.dumps(asdict(result)))
    assert tree["memory"][3]["zero_stage"] == 3 and tree["shards_per_rank"] == 2
    for part in ("emae", "vit_base", "GFLOP", "images/s", "GPU-hours", "largest micro batch", "16 shards, 2.0"):
        assert part in format_plan(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h1000"}, "--gpu h1000: unknown; known are v100"),
        ({"gpu": "v100"}, "--gpu v100: .* bf16.*--set engine.precision=fp16"),
        ({"gpus": 0}, "--gpus 0: must be at least 1"),
        ({"mfu": 1.5}, r"--mfu 1.5: must lie in \(0, 1\]"),
        ({"gpus": 7}, "data.global_batch: 4096"),
    ],
)
def test_impossible_hardware_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        plan(load_recipe("vitb16_mae"), **options)


def test_every_listed_gpu_can_be_planned():
    for gpu, specs in GPUS.items():
        recipe = load_recipe("vitb16_mae", ["engine.precision=fp16"] * (not specs.bf16))
        assert plan(recipe, gpu=gpu).images_per_s > 0
