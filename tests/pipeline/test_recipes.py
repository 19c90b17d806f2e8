"""The recipes that ship: complete, possible, documented, and with the papers' settings."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.estimate.plan import plan
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.recipe.finetune import load_finetune_recipe
from pipeline.recipe.loading import PRESETS, shipped_recipes

MODELS = {
    "vitb16": ("vit_base", 16, (768, 12, 12)),
    "vitl16": ("vit_large", 16, (1024, 24, 16)),
    "vith14": ("vit_huge", 14, (1280, 32, 16)),
}
SLURM = Path(__file__).parents[2] / "slurm"
METHODS = ("mae", "emae", "efficient_mae", "lomar")
NAMES = [f"{model}_{method}" for model in MODELS for method in METHODS]
every_recipe = pytest.mark.parametrize("name", NAMES)


def test_three_models_of_four_methods_ship():
    assert set(NAMES) <= set(shipped_recipes())


@every_recipe
def test_a_recipe_trains_the_model_and_the_method_of_its_name(name):
    model, _, method = name.partition("_")
    recipe = load_recipe(name)
    named, patch, size = MODELS[model]
    assert (recipe.model.name, recipe.model.patch_size, tuple(recipe.model.size)) == (named, patch, size)
    assert recipe.method.name == method and recipe.data.image_size == 224
    with torch.device("meta"):
        build_method(recipe)


@every_recipe
def test_the_optimiser_is_the_papers(name):
    optim = load_recipe(name).optim
    assert (optim.base_lr, optim.betas, optim.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
    assert optim.warmup_epochs == (20 if name.endswith("lomar") else 40) and optim.clip_grad is None


@every_recipe
def test_the_head_comment_names_paper_time_accuracy_and_command(name):
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    head = " ".join(line.removeprefix("# ") for line in lines[: lines.index("seed: 0")])
    assert re.search(r"arXiv \d{4}\.\d{5}|WACV 2024", head)
    assert re.search(r"\b\d+ (A100|H100)\b.*\b\d+(\.\d)? hours", head)
    assert "ImageNet-1k" in head or "No figure" in head
    assert f"deepspeed --module pipeline pretrain {name} --data DATA --run RUN" in head
    assert "has not been trained to the end" in head


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("_emae", "_lomar"))])
def test_hours_that_nobody_has_published_are_the_plans(name):
    head = (PRESETS / f"{name}.yaml").read_text().partition("seed: 0")[0]
    said = re.search(
        r"an estimate by `pipeline plan`: (\d+) H100 at (\d+) % of their peak, an assumption, "
        r"would take ([\d.]+) hours",
        head,
    )
    gpus, percent, hours = map(float, said.groups())
    cost = plan(load_recipe(name), gpus=int(gpus), mfu=percent / 100)
    assert hours == pytest.approx(cost.hours, abs=0.06)


def test_the_mask_ratios_are_the_papers():
    visible = {name: load_recipe(name).num_visible for name in NAMES}
    assert [visible[f"{model}_mae"] for model in MODELS] == [49, 49, 64]
    assert [visible[f"{model}_emae"] for model in MODELS] == [49, 49, 64]  # K = 4 is MAE's ratio
    assert [visible[f"{model}_efficient_mae"] for model in MODELS] == [29, 29, 38]
    assert [visible[f"{model}_lomar"] for model in MODELS] == [10, 10, 10]  # 39 of 49 masked


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
def test_the_batch_divides_among_the_usual_numbers_of_gpus(gpus):
    for name in NAMES:
        assert load_recipe(name).accumulation(gpus) >= 1


def ranks_of(template: str) -> int:
    """Tasks that a Slurm template asks for."""
    text = (SLURM / f"{template}.sh").read_text()
    nodes, tasks = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE)[1])
        for name in ("nodes", "ntasks-per-node")
    )
    return nodes * tasks


@pytest.mark.parametrize(("size", "model"), [("vitl", "vitl16"), ("vith", "vith14")])
def test_the_batch_divides_among_the_tasks_of_the_models_slurm_templates(size, model):
    for method in METHODS:
        assert load_recipe(f"{model}_{method}").accumulation(ranks_of(f"pretrain_{size}")) >= 1
    tuning = load_finetune_recipe(f"finetune_{model}", "W")
    assert tuning.accumulation(ranks_of(f"finetune_{size}")) >= 1


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
    assert recipe.data.crop_scale == (0.08, 1.0) and recipe.resize == 256
    head = (PRESETS / f"finetune_{model}.yaml").read_text().partition("seed: 0")[0]
    assert f"finetune finetune_{model} --weights RUN --data TRAIN --val VAL --run DIR" in head
    assert "hours on" in head and "has not been trained to the end" in head
