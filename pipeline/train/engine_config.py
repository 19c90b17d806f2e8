"""DeepSpeed's configuration: how the engine works, by a file, and what it computes, by the recipe.

Invariant: the recipe decides batch, precision, optimiser, schedule and clipping; the file only how the engine
does it. What both set must be the same, and what is not known to leave results and checkpoints right is
refused by name; what has no effect in the run is left out and said. So neither can silently win. "auto" in
the file leaves a key to the recipe or to DeepSpeed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.loading import flat, parse_overrides

ADAM_EPS = 1e-8
ENGINE_KEYS = {  # what a file may set beside what the recipe decides; "a.*": all of section a
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger.*",
    "flops_profiler.*",
    "timers.throughput.enabled",
    "timers.throughput.synchronized",
    "fp16.loss_scale",
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.consecutive_hysteresis",
    "fp16.min_loss_scale",
    "zero_optimization.allgather_partitions",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.offload_optimizer.buffer_count",
    "zero_optimization.offload_optimizer.fast_init",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
}
OF_THE_RECIPE = {"optimizer": "optim", "scheduler": "optim", "activation_checkpointing": "engine"}


def engine_config(recipe: TrainingRecipe, world_size: int, path: Path | None = None) -> dict:
    """What DeepSpeed is to be given. path: the user's file; None: the one that ships for the recipe's stage.

    UserError for a key that contradicts the recipe, naming both places, and for one that is not taken over.
    """
    path = path or _shipped(recipe)
    decided = _decided(recipe, world_size)
    taken = {}
    for key, value in _read(path).items():
        if key in decided:
            wanted, place = decided[key]
            if not _same(value, wanted):
                said, meant = json.dumps(value), json.dumps(wanted)
                raise UserError(
                    f"{path}: {key} is {said}, the recipe's {place} is {meant}: give both the same, or write "
                    '"auto" in the file'
                )
        elif key in ENGINE_KEYS or f"{key.split('.')[0]}.*" in ENGINE_KEYS:
            taken[key] = value
        else:
            section = OF_THE_RECIPE.get(key.split(".")[0])
            why = f"the recipe decides that, by {section}" if section else "is not known to be safe here"
            raise UserError(f"{path}: {key}: {why}; take it out (docs/engine.md lists what a file may set)")
    sixteen_bits = recipe.engine.precision != "fp32"
    if recipe.engine.zero_stage == 0 and sixteen_bits:
        del decided["data_types.grad_accum_dtype"]  # DeepSpeed adds up 16-bit gradients in 16 bits only there
    ours = {
        key: value
        for key, (value, _) in decided.items()
        if not key.startswith("optimizer") and value is not False and value != "none"
    }
    ours["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW: nothing to compile
    # DeepSpeed's clock makes the host wait for the device twice a micro batch.
    defaults: dict[str, object] = {"steps_per_print": None, "timers.throughput.enabled": False}
    if recipe.engine.precision == "bf16":
        ours["bf16.check_grad_overflow"] = False  # the guard judges the gradient's norm, on the device
        defaults["communication_data_type"] = "fp32"  # as MAE's, whose gradients are fp32
    return _nested({**defaults, **{k: v for k, v in taken.items() if _applies(k, recipe)}, **ours})


def engine_overrides(path: Path, given: Sequence[str]) -> list[str]:
    """The recipe's keys that the file sets, ZeRO's stage and offload, as "a.b=c". given: the user's own.

    UserError where both set one and differ, or the file cannot be read.
    """
    file = _read(path)
    values = {}
    if (stage := file.get("zero_optimization.stage")) is not None:
        values["engine.zero_stage"] = str(stage)
    if (device := file.get("zero_optimization.offload_optimizer.device")) is not None:
        values["engine.offload"] = {"none": "none", "cpu": "optimizer"}.get(str(device))
        if values["engine.offload"] is None:
            raise UserError(
                f"{path}: zero_optimization.offload_optimizer.device: cpu or none, not {device!r}"
            )
    found = [f"{key}={value}" for key, value in values.items()]
    said, meant = parse_overrides(given), parse_overrides(found)
    for key in meant.keys() & said.keys():
        if said[key] != meant[key]:
            raise UserError(f"--set {key}={said[key]}: {path} says {meant[key]}; leave one of them out")
    return found


def unused(path: Path, recipe: TrainingRecipe) -> list[str]:
    """The file's keys that have no bearing on the recipe, and are left out: of fp16's loss scale in another
    precision, of an offload that there is none of."""
    return [key for key in _read(path) if key in ENGINE_KEYS and not _applies(key, recipe)]


def _shipped(recipe: TrainingRecipe) -> Path:
    package = Path(__file__).parents[1]
    installed = package / "ds_configs"
    folder = installed if installed.is_dir() else package.parent / "ds_configs"
    return folder / f"zero{recipe.engine.zero_stage}{'_offload' * (recipe.engine.offload != 'none')}.json"


def _decided(recipe: TrainingRecipe, world_size: int) -> dict[str, tuple[object, str]]:
    """What the recipe decides, by DeepSpeed's key, and where it does."""
    engine, optim = recipe.engine, recipe.optim
    offload = "none" if engine.offload == "none" else "cpu"
    return {
        "train_batch_size": (recipe.data.global_batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": (engine.micro_batch, "engine.micro_batch"),
        "gradient_accumulation_steps": (
            recipe.accumulation(world_size),
            f"data.global_batch over engine.micro_batch and {world_size} ranks",
        ),
        "gradient_clipping": (optim.clip_grad or 0.0, "optim.clip_grad"),
        "bf16.enabled": (engine.precision == "bf16", "engine.precision"),
        "fp16.enabled": (engine.precision == "fp16", "engine.precision"),
        "data_types.grad_accum_dtype": ("fp32", "sum of gradients"),
        "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
        "zero_optimization.offload_optimizer.device": (offload, "engine.offload"),
        "optimizer.type": ("AdamW", "optimiser"),
        "optimizer.params.lr": (recipe.lr, "optim.base_lr x data.global_batch / 256"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (ADAM_EPS, "optimiser's eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
    }


def _applies(key: str, recipe: TrainingRecipe) -> bool:
    """DeepSpeed takes a section that is there for one that is wanted."""
    if key.startswith("fp16."):
        return recipe.engine.precision == "fp16"
    return recipe.engine.offload != "none" or ".offload_optimizer." not in key


def _read(path: Path) -> dict[str, object]:
    """A file's values by their keys' paths, "a.b.c", without those that are "auto"."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed_config {path}: not a JSON object")
    return {key: value for key, value in flat(tree).items() if value != "auto"}


def _nested(values: dict[str, object]) -> dict:
    tree: dict = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def _same(one: object, other: object) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
