"""Operations per micro batch and step with which ZeRO 1 accumulates bf16 gradients and takes their norm.

    python benchmarks/gradient_accumulation.py                    all paper recipes
    python benchmarks/gradient_accumulation.py --only vith14_mae

Compares DeepSpeed's loops over the parameters with pipeline/train/foreach_gradients.py, on the meta device: without
a GPU, and without memory. On a GPU an operation of the loops is one kernel; a foreach operation is one kernel for about
20 million elements or 60 parameters, which is estimated here.
"""

import argparse
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.recipe.loading import list_presets
from pipeline.train import engine
from pipeline.train.foreach_gradients import add_gradients, global_norm

KERNEL_ELEMENTS, KERNEL_TENSORS = 320 * 65536, 64
"""What one kernel of a foreach operation of two lists of tensors processes at most (ATen's multi_tensor_apply)."""


class KernelCounter(TorchDispatchMode):
    """Counts operations, and estimates GPU kernels."""

    def __init__(self):
        super().__init__()
        self.operations = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            self.operations += 1
            self.kernels += count_kernels(args[0]) if "_foreach" in func.__name__ else 1
        return result


def count_kernels(tensors: list[torch.Tensor]) -> int:
    elements = sum(tensor.numel() for tensor in tensors)
    return max(-(-elements // KERNEL_ELEMENTS), -(-len(tensors) // KERNEL_TENSORS))


def count(function, *args) -> KernelCounter:
    with KernelCounter() as counter:
        function(*args)
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = [name for name in list_presets() if name.startswith("vit")]
    parser.add_argument("--only", nargs="+", choices=recipes, default=recipes, metavar="RECIPE")
    args = parser.parse_args()
    optimizer_class = engine.deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    deepspeed_norm = engine.deepspeed.runtime.utils.get_global_norm_of_tensors
    print(f"{'':24}{'accumulation, per micro batch':^40}{'norm, per step':^40}")
    print(f"{'recipe':<24}" + 2 * f"{'DeepSpeed':>12}{'ours':>10}{'ours, kernels':>18}")
    for name in args.only:
        with torch.device("meta"):
            method = build_method(load_recipe(name)).bfloat16()
            groups = [group["params"] for group in method.parameter_groups(0.05)]
            for parameter in method.parameters():
                parameter.grad = torch.empty_like(parameter)
            sums = [[torch.empty(p.numel()) for p in group] for group in groups]
        optimizer = SimpleNamespace(
            bf16_groups=groups,
            fp32_groups_gradients=sums,
            fp32_groups_has_gradients=[[False] * len(group) for group in groups],
            immediate_grad_update=False,
            autoep_folding_tp_group=None,
        )
        optimizer._update_hp_grad = lambda *inputs, o=optimizer: optimizer_class._update_hp_grad(o, *inputs)
        before, after = count(optimizer_class.update_hp_grads, optimizer), count(add_gradients, optimizer)
        row = f"{name:<24}{before.operations:>12}{after.operations:>10}{after.kernels:>18}"
        with FakeTensorMode():  # DeepSpeed copies each norm to its own device, which the meta device cannot
            all_sums = [torch.empty(total.numel(), device="cpu") for group in sums for total in group]
            before, after = count(deepspeed_norm, all_sums), count(global_norm, all_sums)
        print(f"{row}{before.operations:>12}{after.operations:>10}{after.kernels:>18}", flush=True)


if __name__ == "__main__":
    main()
