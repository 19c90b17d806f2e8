"""The shipped recipes: valid, documented, and with the papers' settings."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.estimate.plan import plan
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.recipe.loading import PRESETS_DIR, list_presets
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.finetune_plan import plan_finetune

MODELS = {
    "vitb16": ("vit_base", 16, (768, 12, 12)),
    "vitl16": ("vit_large", 16, (1024, 24, 16)),
    "vith14": ("vit_huge", 14, (1280, 32, 16)),
}
SLURM = Path(__file__).parents[2] / "slurm"
METHODS = ("mae", "emae", "efficient_mae", "lomar")
NAMES = [f"{model}_{method}" for model in MODELS for method in METHODS]
VARIANTS = ["vitb16_mae_448", "vitb16_lomar_448", "vitl16_efficient_mae_200"]
TOKENS = ["vitb16_lomar_beit"]
every_recipe = pytest.mark.parametrize("name", NAMES)


def header(name: str) -> str:
    """The comment at the start of a recipe file, as one line."""
    comment = (PRESETS_DIR / f"{name}.yaml").read_text().partition("seed: 0")[0]
    return " ".join(line.removeprefix("# ") for line in comment.splitlines())


def test_every_model_ships_with_every_method():
    assert set(NAMES) <= set(list_presets())


@every_recipe
def test_a_recipe_has_the_model_and_method_of_its_name(name):
    model, _, method = name.partition("_")
    recipe = load_recipe(name)
    model_name, patch, size = MODELS[model]
    assert (recipe.model.name, recipe.model.patch_size, tuple(recipe.model.size)) == (model_name, patch, size)
    assert recipe.method.name == method and recipe.data.image_size == 224
    with torch.device("meta"):
        build_method(recipe)


@every_recipe
def test_the_optimizer_is_the_papers(name):
    optim = load_recipe(name).optim
    assert (optim.base_lr, optim.betas, optim.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
    warmup = 80 if name.endswith("lomar") else 5 if name == "vitl16_emae" else 40
    assert optim.warmup_epochs == warmup and optim.clip_grad is None


def test_lomar_warms_up_for_5_percent_of_the_epochs():
    for name in [*NAMES, *VARIANTS]:
        recipe = load_recipe(name)
        if recipe.method.name == "lomar":
            assert recipe.optim.warmup_epochs == 0.05 * recipe.train.epochs


def test_lomar_inside_beit_differs_from_beit_in_the_method_only():
    recipe, beit, lomar = map(load_recipe, ("vitb16_lomar_beit", "vitb16_beit", "vitb16_lomar"))
    assert recipe.differences(beit).keys() == {"method.name"}
    assert (recipe.method.name, recipe.method.lomar) == ("lomar", lomar.method.lomar)


def test_emae_has_the_abstracts_share_of_maes_compute():
    """13 % of MAE's time for ViT-L; 300 epochs for ViT-B."""
    emae, mae = load_recipe("vitl16_emae"), load_recipe("vitl16_mae")
    assert 4 * emae.train.epochs / mae.train.epochs == pytest.approx(0.13, abs=0.01)
    assert load_recipe("vitb16_emae").train.epochs == 300


def test_variants_differ_from_their_recipe_in_the_documented_keys():
    for name, base, keys in (
        ("vitb16_mae_448", "vitb16_mae", {"data.image_size"}),
        ("vitb16_lomar_448", "vitb16_lomar", {"data.image_size"}),
        ("vitl16_efficient_mae_200", "vitl16_efficient_mae", {"train.epochs"}),
    ):
        assert load_recipe(name).differences(load_recipe(base)).keys() == keys
    assert load_recipe("vitl16_efficient_mae_200").train.epochs == 200  # Section 5.1
    for name in ("finetune_vitb16_384", "finetune_vitl16_384", "finetune_vith14_448"):
        recipe, base = (load_finetune_recipe(n, "W") for n in (name, name.rpartition("_")[0]))
        assert recipe.differences(base).keys() == {"data.image_size"}
        assert recipe.eval_resize == recipe.data.image_size == int(name.rpartition("_")[2])
        text = header(name)
        assert f"finetune {name} --weights RUN --data TRAIN --val VAL --run DIR" in text
        assert "not found" in text and "hours on 8 H100" in text and "has not been trained to the end" in text


@pytest.mark.parametrize(("name", "mean", "best"), [("vitb16", "83.57", "83.66"), ("vitl16", "85.87", "85.95")])
def test_headers_quote_the_mean_of_seeds_and_the_best(name, mean, best):
    for recipe in (f"{name}_mae", f"finetune_{name}"):
        assert f"{mean} +- " in header(recipe) and f"{best} the best" in header(recipe)


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS, *TOKENS])
def test_a_header_has_paper_time_accuracy_and_command(name):
    text = header(name)
    assert re.search(r"arXiv \d{4}\.\d{5}|WACV 2024", text)
    assert re.search(r"\bTime\b.*\b\d+(\.\d)? hours", text) and re.search(r"\b\d+ (A100|H100)\b", text)
    assert "ImageNet-1k" in text or "No figure" in text
    assert f"deepspeed --module pipeline pretrain {name} --data DATA --run RUN" in text
    assert "has not been trained to the end" in text


@pytest.mark.parametrize(
    "name", [*(name for name in NAMES if name.endswith(("_emae", "_lomar"))), *VARIANTS[:2], *TOKENS]
)
def test_unpublished_hours_are_those_of_plan(name):
    estimate = re.search(
        r"estimated by `pipeline plan`: ([\d.]+) hours on (\d+) H100 at an assumed MFU of (\d+) %", header(name)
    )
    hours, gpus, percent = map(float, estimate.groups())
    assert hours == pytest.approx(plan(load_recipe(name), gpus=int(gpus), mfu=percent / 100).hours, abs=0.06)


def test_the_mask_ratios_are_the_papers():
    visible = {name: load_recipe(name).num_visible for name in NAMES}
    assert [visible[f"{model}_mae"] for model in MODELS] == [49, 49, 64]
    assert [visible[f"{model}_emae"] for model in MODELS] == [49, 49, 64]  # K = 4 is MAE's ratio
    assert [visible[f"{model}_efficient_mae"] for model in MODELS] == [29, 29, 38]
    assert [visible[f"{model}_lomar"] for model in MODELS] == [10, 10, 10]  # 39 of 49 masked


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
def test_the_batch_divides_among_the_usual_numbers_of_gpus(gpus):
    for name in NAMES:
        assert load_recipe(name).images_per_rank(gpus) >= 1


@pytest.mark.parametrize(("size", "model"), [("vitl", "vitl16"), ("vith", "vith14")])
def test_the_batch_divides_among_the_tasks_of_slurm_scripts(size, model):
    def world_size(script: str) -> int:
        text = (SLURM / f"{script}.sh").read_text()
        nodes, tasks = (
            int(re.search(rf"^#SBATCH --{option}=(\d+)$", text, re.MULTILINE)[1])
            for option in ("nodes", "ntasks-per-node")
        )
        return nodes * tasks

    for method in METHODS:
        recipe = load_recipe(f"{model}_{method}")
        assert recipe.images_per_rank(world_size(f"pretrain_{size}")) >= 1
    recipe = load_finetune_recipe(f"finetune_{model}", "W")
    assert recipe.images_per_rank(world_size(f"finetune_{size}")) >= 1


@pytest.mark.parametrize(
    ("model", "rate", "epochs", "decay", "drop"),
    [("vitb16", 5e-4, 100, 0.65, 0.1), ("vitl16", 1e-3, 50, 0.75, 0.2), ("vith14", 1e-3, 50, 0.75, 0.3)],
)
def test_fine_tuning_has_the_settings_of_maes_code(model, rate, epochs, decay, drop):
    recipe = load_finetune_recipe(f"finetune_{model}", "W")
    assert (recipe.optim.base_lr, recipe.train.epochs, recipe.data.global_batch) == (rate, epochs, 1024)
    assert (recipe.optim.warmup_epochs, recipe.optim.min_lr, recipe.optim.betas) == (5, 1e-6, (0.9, 0.999))
    options = recipe.classifier
    assert (options.layer_decay, options.drop_path, options.encoder) == (decay, drop, MODELS[model][0])
    assert (options.mixup, options.cutmix, options.label_smoothing) == (0.8, 1.0, 0.1)
    assert (options.erasing, options.rand_augment, options.rand_augment_deviation) == (0.25, 9, 0.5)
    assert recipe.data.crop_scale == (0.08, 1.0) and recipe.eval_resize == 256
    text = header(f"finetune_{model}")
    assert f"finetune finetune_{model} --weights RUN --data TRAIN --val VAL --run DIR" in text
    assert "hours on" in text and "has not been trained to the end" in text


@pytest.mark.parametrize(
    ("model", "decay", "drop", "steps"),
    [("vitb16", 0.7, 0.1, 184_375), ("vitl16", 0.8, 0.4, 184_375), ("vith14", 0.9, 0.5, 138_281)],
)
def test_detection_has_the_settings_of_vitdet(model, decay, drop, steps):
    recipe = load_finetune_recipe(f"detect_{model}", "W")
    assert (recipe.peak_lr, recipe.optim.betas, recipe.optim.weight_decay) == (1e-4, (0.9, 0.999), 0.1)
    assert (recipe.optim.warmup_steps, recipe.optim.decay, recipe.train.steps) == (250, "steps", steps)
    assert recipe.optim.decay_steps == pytest.approx((8 / 9, 26 / 27), abs=1e-5)
    options = recipe.detector
    assert (options.layer_decay, options.drop_path, options.encoder) == (decay, drop, MODELS[model][0])
    assert (options.patch_size, options.window_size, options.scale) == (16, 14, (0.1, 2.0))
    assert (options.width, options.head_convs, options.fc_width, options.samples_per_image) == (256, 4, 1024, 512)
    assert (recipe.data.image_size, recipe.data.global_batch) == (1024, 64)
    text = header(f"detect_{model}")
    assert f"finetune detect_{model} --weights RUN --data COCO_TRAIN --val COCO_VAL --run DIR" in text
    assert "arXiv 2203.16527" in text and "has not been trained to the end" in text


@pytest.mark.parametrize(("model", "decay", "drop"), [("vitb16", 0.65, 0.1), ("vitl16", 0.75, 0.2)])
def test_segmentation_has_the_settings_of_the_reproduction(model, decay, drop):
    recipe = load_finetune_recipe(f"segment_{model}", "W")
    assert (recipe.data.image_size, recipe.data.global_batch, recipe.train.steps) == (512, 16, 160_000)
    optim, options = recipe.optim, recipe.segmenter
    assert (optim.betas, optim.weight_decay, optim.warmup_steps) == ((0.9, 0.999), 0.05, 1500)
    assert recipe.peak_lr == pytest.approx(1e-4) and (optim.decay, optim.min_lr) == ("linear", 0.0)
    assert (options.layer_decay, options.drop_path, options.encoder) == (decay, drop, MODELS[model][0])
    assert (options.scale, options.cat_max_ratio, options.auxiliary_weight) == ((0.5, 2.0), 0.75, 0.4)
    assert (options.dropout, options.auxiliary_channels, options.relative_positions) == (0.1, 256, True)
    assert options.photometric and recipe.data.flip and recipe.window_stride == 341
    assert recipe.gradient_accumulation_steps(8) == 1, "batch normalization over the whole batch"
    text = header(f"segment_{model}")
    assert f"finetune segment_{model} --weights RUN --data TRAIN --val VAL --run DIR" in text
    assert "has not been trained to the end" in text
    hours = re.search(r"estimated by `pipeline plan`: ([\d.]+) hours on 8 H100 at an assumed MFU of 40 %", text)
    planned = plan_finetune(recipe, gpus=8, nodes=1, gpu="h100", mfu=0.4)
    assert hours and planned.hours == pytest.approx(float(hours[1]), abs=0.06)
