"""engine.micro_batch: auto divides a rank's share, fits into the GPU, and stays when a run resumes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.estimate.memory import OVERHEAD_GIB, RESERVE_GIB
from pipeline.estimate.plan import memory_gib, plan, pretraining_limits, resolve_recipe
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import is_auto
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.recipe.training import choose_micro_batch
from pipeline.train.micro_batch import CPU_MICRO_BATCH, MicroBatchLimits, resolve_micro_batch
from pipeline.train.run_directory import RunDirectory

METHODS = ("mae", "emae", "efficient_mae", "lomar")
ON_8_GPUS_OF_80_GB = {  # by the arithmetic of GPU launches; none of them is measured
    "vitl16": {"mae": 512, "emae": 128, "efficient_mae": 128, "lomar": 128},
    "vith14": {"mae": 256, "emae": 64, "efficient_mae": 128, "lomar": 64},
}


@given(st.integers(1, 2000), st.sampled_from([1, 2, 3, 4, 8]), st.floats(0, 5000))
def test_the_choice_is_the_largest_divisor_within_the_limit(multiple, unit, limit):
    share = unit * multiple
    chosen = choose_micro_batch(share, unit, limit)
    assert share % chosen == 0 and chosen % unit == 0
    candidates = [n for n in range(unit, share + 1, unit) if share % n == 0 and n <= limit]
    assert chosen == (max(candidates) if candidates else unit)


@pytest.mark.parametrize("model", ["vitb16", "vitl16", "vith14"])
@pytest.mark.parametrize("method", METHODS)
def test_every_paper_recipe_divides_among_1_to_64_gpus(model, method):
    recipe = load_recipe(f"{model}_{method}")
    assert is_auto(recipe.engine.micro_batch)
    for gpu in ("rtx4090", "h100"):
        limits = pretraining_limits(recipe, 1, memory_gib(gpu))
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            number = choose_micro_batch(recipe.images_per_rank(ranks), 1, limits.limit)
            assert number <= limits.fitting
            assert recipe.with_micro_batch(number).gradient_accumulation_steps(ranks) * number * ranks == (
                recipe.data.global_batch
            )


@pytest.mark.parametrize("model", list(ON_8_GPUS_OF_80_GB))
def test_the_choice_on_8_gpus_of_80_gb(model):
    for method, expected in ON_8_GPUS_OF_80_GB[model].items():
        assert resolve_recipe(load_recipe(f"{model}_{method}"), 8, "h100").engine.micro_batch == expected, method


def test_the_choice_leaves_the_reserve_free():
    recipe = load_recipe("vith14_mae")
    result = plan(recipe, gpus=8, gpu="rtx4090")
    used = result.memory[1].total
    assert result.recipe_micro_batch == "auto"
    assert OVERHEAD_GIB < used <= memory_gib("rtx4090") - RESERVE_GIB
    larger = plan(recipe.with_micro_batch(2 * result.micro_batch), gpus=8, gpu="rtx4090")
    assert larger.memory[1].total > memory_gib("rtx4090") - RESERVE_GIB


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def no_limits(memory_gib: float) -> MicroBatchLimits:
    raise AssertionError("asked for the memory of a CPU")


def test_a_number_in_the_recipe_stays(run):
    recipe = load_recipe("vitb16_mae", ["engine.micro_batch=100"])
    assert resolve_micro_batch(recipe, run, 3, None, no_limits) is recipe


@pytest.mark.parametrize("ranks", [1, 64, 1024])
def test_a_cpu_gets_a_small_number(run, ranks):
    number = resolve_micro_batch(load_recipe("vitb16_mae"), run, ranks, None, no_limits).engine.micro_batch
    assert number == min(CPU_MICRO_BATCH, 4096 // ranks)


@pytest.mark.parametrize(
    ("recorded", "ranks", "fitting", "number"),
    [
        (64, 8, 100, 64),  # as before, although 128 would be faster
        (64, 8, 1000, 64),
        (64, 8, 32, 32),  # on a smaller GPU
        (48, 8, 1000, 256),  # does not divide 512
        (64, 128, 1000, 32),
    ],
)
def test_a_resumed_run_keeps_its_number_if_it_fits(run, recorded, ranks, fitting, number):
    recipe = load_recipe("vitb16_mae")
    run.recipe_file.write_text(recipe.with_micro_batch(recorded).to_yaml())
    resolved = resolve_micro_batch(recipe, run, ranks, 80.0, lambda memory: MicroBatchLimits(fitting, 256))
    assert resolved.engine.micro_batch == number


def test_a_batch_that_cannot_be_divided_is_an_error(run):
    with pytest.raises(UserError, match=r"data\.global_batch: 4096 .* 7 ranks"):
        resolve_micro_batch(load_recipe("vitb16_mae"), run, 7, None, no_limits)


def test_fine_tuning_pairs_images_for_mixup(run):
    recipe = load_finetune_recipe("finetune_vitl16", "W", ["data.crops_per_image=2"])
    resolved = resolve_micro_batch(recipe, run, 8, 80.0, lambda memory: MicroBatchLimits(7, 256))
    assert resolved.engine.micro_batch == 4


def test_auto_is_read_and_written(tmp_path):
    recipe = load_recipe("vitb16_mae")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe and "micro_batch: auto" in recipe.to_yaml()
    for wrong in ("aut", "0", "1.5", "null"):
        with pytest.raises(UserError, match=r"engine\.micro_batch: .*input should be"):
            load_recipe("vitb16_mae", [f"engine.micro_batch={wrong}"])
