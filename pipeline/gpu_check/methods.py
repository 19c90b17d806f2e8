"""Check 5: the four methods compute on a GPU what they compute on the CPU."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from pipeline.distributed.launch import init_dist_env
from pipeline.gpu_check.check import Context, Finding, judge, largest_difference
from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.recipe import Recipe

METHODS = ("mae", "emae", "efficient_mae", "lomar")


class Row(NamedTuple):
    """A step's results."""

    loss: float
    norm: float
    """Of the gradient."""
    visible_ids: list
    """Positions of the visible patches."""


class Errors(NamedTuple):
    """Largest relative differences."""

    loss: float
    norm: float
    """Of the gradient."""

    def __str__(self) -> str:
        return f"loss {self.loss:.0e} norm {self.norm:.0e}"


STEPS, BATCH, LR = 3, 4, 1e-3
BOUNDS = {"fp32": Errors(1e-5, 1e-5), "bf16": Errors(1e-2, 5e-2)}
"""In bf16 signs of EMAE's absolute differences flip: gradient norms differ by up to 3 % on the CPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_methods(context: Context) -> Finding:
    """Compare loss, gradient norm and masks of three steps with float64 on the CPU."""
    device = init_dist_env().device
    # Few blocks of the real widths: attention with heads of 64 (L), 80 (H) and 32 (decoder) channels.
    sizes = {"vitl16": "model.depth=4", "vith14": "model.depth=4"} if context.on_gpu else {"vitb16": "model.depth=2"}
    errors = dict.fromkeys(DTYPES, Errors(0.0, 0.0))
    masks_equal = True
    for size, depth in sizes.items():
        for name in METHODS:
            recipe = context.recipe(f"{size}_{name}", depth)
            reference = train(recipe, torch.device("cpu"), torch.float64)
            for precision, dtype in DTYPES.items():
                rows = train(recipe, device, dtype)
                errors[precision] = Errors(*map(max, errors[precision], compare(rows, reference)))
                masks_equal = masks_equal and all(
                    a.visible_ids == b.visible_ids for a, b in zip(rows, reference, strict=True)
                )
    return judge_errors(errors, masks_equal, device)


def judge_errors(errors: Mapping[str, Errors], masks_equal: bool, device: torch.device) -> Finding:
    """Judge the largest errors on a device, by precision."""
    texts = [f"{precision} {values}" for precision, values in errors.items()]
    bounds = [f"{precision} {values}" for precision, values in BOUNDS.items()]
    passed = all(a <= b for name, values in errors.items() for a, b in zip(values, BOUNDS[name], strict=True))
    return Finding(
        f"{device.type} against float64 on the CPU: {', '.join(texts)}; masks {'' if masks_equal else 'not '}equal",
        f"{', '.join(bounds)}; masks equal",
        judge(passed and masks_equal),
    )


def train(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Train a few steps of gradient descent."""
    torch.manual_seed(0)
    method: Method = build_method(recipe).to(device, dtype)
    masters = [p.detach().double() for p in method.parameters()]
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, recipe.data.image_size, recipe.data.image_size, generator=generator)
        noise = torch.rand(BATCH, method.noise_size, generator=generator)
        output = method(images.to(device), noise.to(device))
        method.zero_grad()
        output.loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.parameters()]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        rows.append(Row(output.loss.item(), norm.item(), output.visible_ids.tolist()))
        with torch.no_grad():
            for parameter, master, gradient in zip(method.parameters(), masters, gradients, strict=True):
                parameter.copy_(master.sub_(LR * gradient.double()))
    return rows


def compare(rows: list[Row], reference: list[Row]) -> Errors:
    """Return the largest relative differences of the losses and of the gradient norms."""
    losses, expected_losses = ([row.loss for row in table] for table in (rows, reference))
    norms, expected_norms = ([row.norm for row in table] for table in (rows, reference))
    return Errors(largest_difference(losses, expected_losses), largest_difference(norms, expected_norms))
