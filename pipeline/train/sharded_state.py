"""State of an engine by parameter name, independent of world size and ZeRO stage.

Invariant: `save` writes every element of every trained weight (fp32), of its optimizer state and of its EMA exactly
once, as a range of the flattened parameter of that name; `load` reads ranges. So a checkpoint fits any world size and
ZeRO stage, with or without offload, and a run that resumes on the same ones is bit-identical.

DeepSpeed's universal checkpoints do not support ZeRO 0, cannot convert to or from ZeRO 3, and with ZeRO 3 give every
parameter group the hyperparameters of the first (weight decay on biases); as of version 0.19.

Where DeepSpeed 0.19 keeps the fp32 weights:

    optimizer                               engines                     a flat tensor has
    torch's or DeepSpeed's                  ZeRO 0 in fp32              a parameter
    FP16_UnfusedOptimizer                   ZeRO 0 in 16 bits           a parameter
    FP16_Optimizer                          the same, fused Adam        a group's parameters
    DeepSpeedZeroOptimizer, BF16_Optimizer  ZeRO 1 and 2                this rank's range of a group
    DeepSpeedZeroOptimizer_Stage3           ZeRO 3                      this rank's range of each parameter
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from pipeline.errors import AllRanksError, join_names
from pipeline.io.tensors import save_slices
from pipeline.recipe.training import TrainingRecipe

WEIGHT, EMA = "fp32", "ema"
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ParamFragment(NamedTuple):
    """`numel` elements of the flattened parameter `name`, from `start` on, at `offset` in a flat tensor."""

    name: str
    start: int
    numel: int
    offset: int


class FlatPartition(NamedTuple):
    """A tensor that the base optimizer updates, and the parameters that its elements belong to."""

    tensor: torch.Tensor
    """The fp32 weights; also the key of their optimizer state."""
    names: list[str]
    """All parameters of the group, also those without a fragment on this rank."""
    fragments: list[ParamFragment]


def iter_flat_partitions(model) -> Iterator[FlatPartition]:
    """Yield the flat tensors with this rank's part of a DeepSpeed engine's trained weights."""
    optimizer, stage = model.optimizer, model.zero_optimization_stage()
    name_of = {id(parameter): name for name, parameter in model.module.named_parameters()}
    if stage == 3:
        tensors, groups, fragments = (
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_groups,
            _fragments_of_param_partitions,
        )
    elif hasattr(optimizer, "bf16_groups"):
        tensors, groups, fragments = (
            optimizer.fp32_groups_flat_partition,
            optimizer.bf16_groups,
            _fragments_of_group_partition,
        )
    elif stage:
        tensors, groups, fragments = (
            optimizer.single_partition_of_fp32_groups,
            optimizer.bit16_groups,
            _fragments_of_group_partition,
        )
    elif hasattr(optimizer, "fp32_groups_flat"):
        tensors, groups, fragments = optimizer.fp32_groups_flat, optimizer.fp16_groups, _consecutive_fragments
    else:
        low = [p for group in model.basic_optimizer.param_groups for p in group["params"]]
        if hasattr(optimizer, "fp32_groups"):
            tensors, low = low, [p for group in optimizer.fp16_groups for p in group]
        else:
            tensors = low
        groups, fragments = [[p] for p in low], _consecutive_fragments
    for tensor, parameters in zip(tensors, groups, strict=True):
        named = [(name_of[id(parameter)], parameter) for parameter in parameters]
        yield FlatPartition(tensor, [name for name, _ in named], fragments(named))


def save(model, path: Path, ema_tensors: list[torch.Tensor]) -> None:
    """Write this rank's part to `path`. Without ZeRO only rank 0 writes, because all ranks have the same state.

    Args:
        ema_tensors: EMA of the tensors of `iter_flat_partitions`, in their order; empty without EMA.
    """
    if not model.zero_optimization_stage() and dist.get_rank():
        return
    tensors, ranges = _collect_state(model, ema_tensors)
    save_slices(tensors, path, {"ranges": json.dumps(ranges)})
    del tensors
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()  # torch would keep the page-locked memory until the process ends


def _collect_state(model, ema_tensors: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Return this rank's tensors by "kind:name", on the host, and the range of each parameter that they have."""
    tensors, ranges = {}, {}
    for number, flat in enumerate(iter_flat_partitions(model)):
        kinds = {WEIGHT: flat.tensor.detach()}
        if ema_tensors:
            kinds[EMA] = ema_tensors[number]
        for key, value in model.basic_optimizer.state.get(flat.tensor, {}).items():
            if torch.is_tensor(value) and value.numel() == flat.tensor.numel() and key != "step":
                kinds[key] = value
            elif key != "step":
                raise TypeError(f"optimizer state {key!r} of {flat.names[0]}: not one element per weight")
        on_host = {kind: copy_to_host(values.reshape(-1)) for kind, values in kinds.items()}
        for name, start, numel, offset in flat.fragments:
            ranges[name] = [start, numel]
            for kind, values in on_host.items():
                tensors[f"{kind}:{name}"] = values[offset : offset + numel]
    return tensors, ranges


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory: one on a GPU by a single copy to page-locked memory, one on the host itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def scalar_state(model) -> dict:
    """Return the scalars of an engine's state, which are equal on all ranks."""
    optimizer, scaler = model.basic_optimizer, _loss_scaler(model)
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise RuntimeError(f"parameter groups of the optimizer have different step counts: {sorted(steps)}")
    return {
        "steps": model.global_steps,
        "skipped_steps": model.skipped_steps,
        "optimizer_steps": steps.pop() if steps else 0,
        "loss_scale": {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)},
    }


def load(model, paths: list[Path], scalars: dict, ema_tensors: list[torch.Tensor]) -> None:
    """Restore weights, optimizer state, EMA and scalars from the files of all ranks that saved.

    Args:
        paths: The files, in the order of the ranks that wrote them.
        scalars: The result of `scalar_state`.
        ema_tensors: As for `save`; overwritten.

    Raises:
        AllRanksError: If the files have other parameters than the model.
    """
    saved = ShardedStateReader(paths)
    trained = {name for flat in iter_flat_partitions(model) for name in flat.names}
    if trained != saved.names:
        others = join_names(sorted(trained ^ saved.names))
        raise AllRanksError(
            f"{paths[0].parent}: parameters differ from the recipe's model: {others}; restore the checkpoints of this "
            "run"
        )
    optimizer, scaler = model.basic_optimizer, _loss_scaler(model)
    for number, flat in enumerate(iter_flat_partitions(model)):
        saved.fill(flat, WEIGHT, flat.tensor.data)
        if ema_tensors:
            saved.fill(flat, EMA, ema_tensors[number])
        state = optimizer.state[flat.tensor]
        state.clear()
        kinds = {kind for name in flat.names for kind in saved.kinds(name)}
        for kind in sorted(kinds - {WEIGHT, EMA}):
            state[kind] = torch.zeros_like(flat.tensor.data)
            saved.fill(flat, kind, state[kind])
        if "exp_avg" in kinds:
            state["step"] = torch.tensor(float(scalars["optimizer_steps"]), device=flat.tensor.device)
    for key, value in scalars["loss_scale"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)
    model.global_steps, model.skipped_steps = scalars["steps"], scalars["skipped_steps"]
    _copy_to_model_weights(model)


class ShardedStateReader:
    """The files of all ranks that saved, read as one state."""

    def __init__(self, paths: list[Path]):
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._ranges: dict[str, list[tuple[int, int, int]]] = {}  # name: (start, numel, file)
        self._kinds: dict[str, set[str]] = {}
        for number, file in enumerate(self._files):
            for name, (start, numel) in json.loads(file.metadata()["ranges"]).items():
                self._ranges.setdefault(name, []).append((start, numel, number))
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                kind, _, name = key.partition(":")
                self._kinds.setdefault(name, set()).add(kind)

    @property
    def names(self) -> set[str]:
        return set(self._ranges)

    def kinds(self, name: str) -> set[str]:
        """Return what was saved of a parameter: WEIGHT, EMA, and keys of the optimizer state."""
        return self._kinds[name]

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Return elements of the flattened parameter, fp32 (numel,). Raises ValueError if some were not saved."""
        values, found = torch.empty(numel), 0
        for first, count, number in self._ranges[name]:
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                part = self._files[number].get_slice(f"{kind}:{name}")[low - first : high - first]
                values[low - start : high - start] = part
                found += high - low
        if found != numel:
            raise ValueError(f"{kind} of {name}: has {found} of {numel} elements from {start} on")
        return values

    def read_all(self, name: str, kind: str) -> torch.Tensor:
        """Return the whole flattened parameter, fp32."""
        return self.read(name, kind, 0, max(start + numel for start, numel, _ in self._ranges[name]))

    def fill(self, flat: FlatPartition, kind: str, into: torch.Tensor) -> None:
        """Read this rank's fragments into a flat tensor."""
        for name, start, numel, offset in flat.fragments:
            into.view(-1)[offset : offset + numel] = self.read(name, kind, start, numel).to(into.device)


def _consecutive_fragments(named: list[tuple[str, nn.Parameter]]) -> list[ParamFragment]:
    fragments, offset = [], 0
    for name, parameter in named:
        fragments.append(ParamFragment(name, 0, parameter.numel(), offset))
        offset += parameter.numel()
    return fragments


def _fragments_of_group_partition(named: list[tuple[str, nn.Parameter]]) -> list[ParamFragment]:
    fragments = []
    for name, parameter in named:
        mapping = getattr(parameter, "_hp_mapping")  # noqa: B009 (set by DeepSpeed, unknown to the type)
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragments.append(ParamFragment(name, low.start, low.numel, high.start))
    return fragments


def _fragments_of_param_partitions(named: list[tuple[str, nn.Parameter]]) -> list[ParamFragment]:
    fragments, offset = [], 0
    for name, parameter in named:
        parameter: Any  # DeepSpeed adds ds_tensor and ds_numel
        share = parameter.ds_tensor.ds_numel  # the same on every rank; the last ones may end in padding
        start = share * dist.get_rank()
        numel = min(share, parameter.ds_numel - start)
        if numel > 0:
            fragments.append(ParamFragment(name, start, numel, offset))
        offset += share
    return fragments


def _loss_scaler(model):
    """Return the object with the loss scale, None without one."""
    return getattr(model.optimizer, "loss_scaler", None) or getattr(model.optimizer, "loss_scale_config", None)


def _copy_to_model_weights(model) -> None:
    """Copy the fp32 weights to the weights that the model computes with."""
    optimizer, stage = model.optimizer, model.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            low = optimizer.fp16_partitioned_groups_flat[number]
            low.data.copy_(flat.data)
            parts = optimizer.fp16_partitioned_groups[number]
            for part, values in zip(parts, optimizer.unflatten(low, parts), strict=True):
                part.data = values.data
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif optimizer is not model.basic_optimizer:
        parameters = dict(model.module.named_parameters())
        for flat in iter_flat_partitions(model):
            for name, _, numel, offset in flat.fragments:
                values = flat.tensor.data.view(-1)[offset : offset + numel]
                parameters[name].data.copy_(values.view_as(parameters[name]))


def checkpoint_bytes(recipe: TrainingRecipe, num_parameters: int) -> int:
    """Return the size of a checkpoint: fp32 weights (twice), two moments, and the EMA (twice)."""
    return num_parameters * (16 if recipe.train.ema_decay is None else 24)
