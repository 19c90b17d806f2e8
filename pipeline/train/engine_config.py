"""DeepSpeed's configuration: what is computed comes from the recipe, how the engine works from a file.

Invariant: the recipe decides batch size, precision, optimizer, schedule and clipping. A file may repeat these values
but not contradict them; "auto" leaves a key to the recipe or to DeepSpeed. Every other key is passed to DeepSpeed,
except those that have no effect in this run and those that checkpoints do not support.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe.loading import flatten, parse_overrides
from pipeline.recipe.training import TrainingRecipe

ADAM_EPS = 1e-8
RECIPE_SECTIONS = {"optimizer": "optim", "scheduler": "optim", "activation_checkpointing": "engine"}
"""Sections of DeepSpeed's configuration that a section of the recipe replaces."""
UNSUPPORTED = {
    "amp": "use engine.precision",
    "zero_optimization.offload_param": "checkpoints do not support it; use engine.offload",
}


def engine_config(recipe: TrainingRecipe, world_size: int, path: Path | None = None) -> dict:
    """Merge the recipe and a DeepSpeed file.

    Args:
        path: The user's file; None for the one in ds_configs/ for the recipe's ZeRO stage and offload.

    Returns:
        The dictionary for `deepspeed.initialize`.

    Raises:
        UserError: If a key contradicts the recipe, belongs to it, or is not supported.
    """
    path = path or _shipped_file(recipe)
    recipe_keys = _recipe_keys(recipe, world_size)
    from_file = {}
    for key, value in _read(path).items():
        if key in recipe_keys:
            wanted, place = recipe_keys[key]
            if not _equal(value, wanted):
                raise UserError(
                    f"{path}: {key} is {json.dumps(value)}, but the recipe's {place} is {json.dumps(wanted)}; "
                    'change one of them, or write "auto" in the file'
                )
        elif section := RECIPE_SECTIONS.get(key.split(".")[0]):
            raise UserError(f"{path}: {key}: the recipe decides this in section {section}; remove it")
        elif unsupported := [name for name in UNSUPPORTED if f"{key}.".startswith(f"{name}.")]:
            raise UserError(f"{path}: {key}: not supported: {UNSUPPORTED[unsupported[0]]}; remove it")
        elif _has_effect(key, recipe):
            from_file[key] = value
    if recipe.engine.zero_stage == 0 and recipe.engine.precision != "fp32":
        del recipe_keys["data_types.grad_accum_dtype"]  # there DeepSpeed accumulates 16-bit gradients in 16 bits only
    from_recipe = {
        key: value
        for key, (value, _) in recipe_keys.items()
        if not key.startswith("optimizer") and value is not False and value != "none"
    }
    from_recipe["zero_force_ds_cpu_optimizer"] = False  # use torch's fused AdamW, which needs no compilation
    # DeepSpeed's throughput timer synchronizes with the device twice per micro batch.
    defaults: dict[str, object] = {"steps_per_print": None, "timers.throughput.enabled": False}
    if recipe.engine.precision == "bf16":
        from_recipe["bf16.check_grad_overflow"] = False  # the guard checks the gradient norm on the device
        defaults["communication_data_type"] = "fp32"  # as in MAE, whose gradients are fp32
    return _nested({**defaults, **from_file, **from_recipe})


def engine_overrides(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the recipe keys that a DeepSpeed file sets (ZeRO stage and offload) as "a.b=c" overrides.

    Args:
        overrides: The user's own, from --set.

    Raises:
        UserError: If both set a key and differ, or the file cannot be read.
    """
    file = _read(path)
    values = {}
    if (stage := file.get("zero_optimization.stage")) is not None:
        values["engine.zero_stage"] = str(stage)
    if (device := file.get("zero_optimization.offload_optimizer.device")) is not None:
        values["engine.offload"] = {"none": "none", "cpu": "optimizer"}.get(str(device))
        if values["engine.offload"] is None:
            raise UserError(f"{path}: zero_optimization.offload_optimizer.device: {device!r}; use cpu or none")
    from_file = [f"{key}={value}" for key, value in values.items()]
    by_user, by_file = parse_overrides(overrides), parse_overrides(from_file)
    for key in by_file.keys() & by_user.keys():
        if by_user[key] != by_file[key]:
            raise UserError(f"--set {key}={by_user[key]}: {path} has {by_file[key]}; remove one of them")
    return from_file


def ignored_keys(path: Path, recipe: TrainingRecipe) -> list[str]:
    """Return the file's keys without effect: fp16 in another precision, offload_optimizer without offload."""
    return [key for key in _read(path) if not _has_effect(key, recipe) and not key.endswith((".enabled", ".device"))]


def _shipped_file(recipe: TrainingRecipe) -> Path:
    package = Path(__file__).parents[1]
    installed = package / "ds_configs"
    directory = installed if installed.is_dir() else package.parent / "ds_configs"
    return directory / f"zero{recipe.engine.zero_stage}{'_offload' * (recipe.engine.offload != 'none')}.json"


def _recipe_keys(recipe: TrainingRecipe, world_size: int) -> dict[str, tuple[object, str]]:
    """Return DeepSpeed's keys that the recipe decides: key to (value, recipe key for messages)."""
    engine, optim = recipe.engine, recipe.optim
    offload = "none" if engine.offload == "none" else "cpu"
    return {
        "train_batch_size": (recipe.data.global_batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": (engine.micro_batch, "engine.micro_batch"),
        "gradient_accumulation_steps": (
            recipe.gradient_accumulation_steps(world_size),
            f"data.global_batch / (engine.micro_batch x {world_size} ranks)",
        ),
        "gradient_clipping": (optim.clip_grad or 0.0, "optim.clip_grad"),
        "bf16.enabled": (engine.precision == "bf16", "engine.precision"),
        "fp16.enabled": (engine.precision == "fp16", "engine.precision"),
        "data_types.grad_accum_dtype": ("fp32", "gradient accumulation"),
        "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
        "zero_optimization.offload_optimizer.device": (offload, "engine.offload"),
        "optimizer.type": ("AdamW", "optimizer"),
        "optimizer.params.lr": (recipe.peak_lr, "optim.base_lr x data.global_batch / 256"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (ADAM_EPS, "AdamW eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
    }


def _has_effect(key: str, recipe: TrainingRecipe) -> bool:
    """Return False for keys whose mere presence would enable a section that the recipe does not use."""
    if key.startswith("fp16."):
        return recipe.engine.precision == "fp16"
    return recipe.engine.offload != "none" or ".offload_optimizer." not in key


def _read(path: Path) -> dict[str, object]:
    """Return the values of a file by path, "a.b.c", without those that are "auto"."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f'--deepspeed_config {path}: is a JSON {type(tree).__name__}; must be an object, {{"key": value, ...}}'
        )
    return {key: value for key, value in flatten(tree).items() if value != "auto"}


def _nested(values: dict[str, object]) -> dict:
    tree: dict = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def _equal(one: object, other: object) -> bool:
    """Compare values of JSON: strings without case, numbers with a tolerance."""
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
