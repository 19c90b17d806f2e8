"""Accumulation and norm of ZeRO 1's gradients in bf16, with few operations.

DeepSpeed 0.19's BF16_Optimizer adds each parameter's 16-bit gradient to its fp32 sum after every micro batch, and takes
the norm of each sum once per step, by Python loops of two operations per parameter: about 800 GPU kernels for a
ViT-L, three times, which take longer to launch than to run. Here torch's foreach operations process many parameters at
once.

Invariant: sums are bit-identical to DeepSpeed's on every device. So are the norms on a CPU; on a GPU they are reduced
in another order.
"""

from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch

foreach: Any = torch  # whose foreach operations are not declared public
CHUNK_ELEMENTS = 2**23
"""Gradient elements that are converted to fp32 at a time: 32 MiB, which fit into the cache of a large GPU."""


def use_foreach_accumulation(optimizer: Any) -> None:
    """Replace the accumulation of a BF16_Optimizer by `add_gradients`, unless it runs in hooks of each parameter."""
    if optimizer.immediate_grad_update:
        return
    optimizer.update_hp_grads = MethodType(add_gradients, optimizer)


@torch.no_grad()
def add_gradients(optimizer: Any, clear_lp_grads: bool = False) -> None:
    """Add the 16-bit gradients of a micro batch to the fp32 sums: BF16_Optimizer's `update_hp_grads`.

    Args:
        optimizer: A BF16_Optimizer that accumulates in fp32, which is what `engine_config` requests.
        clear_lp_grads: Set the 16-bit gradients to zero.
    """
    gradients, sums = [], []
    for group, group_sums, has_gradient in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
    ):
        for index, (parameter, total) in enumerate(zip(group, group_sums, strict=True)):
            if parameter.grad is not None:
                gradients.append(parameter.grad.view(-1))
                sums.append(total)
                parameter._hp_grad = total
                has_gradient[index] = True
    if not sums:
        return
    buffer = torch.empty(max(CHUNK_ELEMENTS, max(map(len, sums))), dtype=sums[0].dtype, device=sums[0].device)
    for indexes in _split([len(total) for total in sums], len(buffer)):
        chunk = [gradients[index] for index in indexes]
        converted = list(buffer[: sum(map(len, chunk))].split([len(gradient) for gradient in chunk]))
        foreach._foreach_copy_(converted, chunk)
        foreach._foreach_add_([sums[index] for index in indexes], converted)
    if clear_lp_grads:
        foreach._foreach_zero_(gradients)


def global_norm(input_tensors: Iterable[torch.Tensor], mpu: None = None, norm_type: int = 2) -> torch.Tensor:
    """Compute the L2 norm of all elements; -1 if it is not finite. DeepSpeed's `get_global_norm_of_tensors`.

    Args:
        input_tensors: fp32, at least one.
        mpu, norm_type: DeepSpeed's values, which cannot be changed here.
    """
    assert mpu is None and norm_type == 2
    norm = torch.stack(foreach._foreach_norm(list(input_tensors))).pow(2.0).sum().pow(0.5)
    return torch.where(norm.isfinite(), norm, -1.0)


def _split(sizes: list[int], limit: int) -> Iterator[list[int]]:
    """Group consecutive indexes so that the sizes of a group sum up to `limit` at most."""
    group, total = [], 0
    for index, size in enumerate(sizes):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    yield group
