"""Columns that are computed from a recipe: patches, FLOPs and memory."""

from collections.abc import Callable

import torch

from pipeline.estimate.activation_memory import activation_bytes
from pipeline.estimate.memory import GIB, bytes_per_parameter
from pipeline.estimate.plan import IMAGENET_SAMPLES
from pipeline.methods import Method, MethodOutput, build_method
from pipeline.methods.backbone import build_encoder
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.methods.targets import build_target
from pipeline.papers.experiment import ColumnName, Row
from pipeline.recipe import Recipe
from pipeline.recipe.mask_statistics import sample_difficulties
from pipeline.recipe.sections import is_auto

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EncoderOnly(Method):
    """MAE's encoder on whole images, the "mask ratio 0" of Efficient MAE's Table 1."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, self.target = build_encoder(recipe), build_target(recipe)
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = recipe.num_patches

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        tokens = self.forward_features(images)
        ids = self.all_ids(tokens[:, 1:])
        return MethodOutput(tokens.float().square().mean(), tokens.detach(), tokens.detach(), ids, ids[:, :0], {})


def compute(column: ColumnName, row: Row, recipe: Recipe) -> float:
    """Compute a column of a row whose pre-training recipe, with all overrides, is `recipe`."""
    build = EncoderOnly if row.encoder_only else build_method
    if column == "patches":
        is_masked = recipe.method.name == "efficient_mae"
        return recipe.mean_kept_patches if is_masked else recipe.num_patches - recipe.num_visible
    if column == "neighbors":
        geometry = recipe.grid, recipe.num_visible, recipe.model.patch_size
        return 100 * sample_difficulties(*geometry, "neighbors_3x3").isfinite().float().mean().item()
    if column == "gmacs":
        return forward_flops(recipe, build=build) / 2e9
    if column == "compute":
        images = recipe.total_steps(IMAGENET_SAMPLES) * recipe.data.global_batch
        return training_flops(forward_flops(recipe, _micro_batch(recipe))) * images / 1e18
    if column == "memory":
        return (_measure_memory if torch.cuda.is_available() else _estimate_memory)(recipe, build)
    raise ValueError(f"column: {column!r} is not computed from a recipe")


def _micro_batch(recipe: Recipe) -> int:
    """Return the recipe's micro batch; if it is auto, a GPU's share of the 4 of Efficient MAE's experiments."""
    micro_batch = recipe.engine.micro_batch
    return recipe.images_per_rank(4) if is_auto(micro_batch) else micro_batch


def _estimate_memory(recipe: Recipe, build: Callable[[Recipe], Method]) -> float:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(recipe).parameters())
    activations = _micro_batch(recipe) * activation_bytes(recipe, build)
    return (parameters * sum(bytes_per_parameter(recipe)) + activations) / GIB


def _measure_memory(recipe: Recipe, build: Callable[[Recipe], Method]) -> float:
    """Measure the peak memory of two training steps on a GPU, with fp32 weights and gradients for the optimizer."""
    with torch.device("cuda"):
        method = build(recipe)
    masters = [p.detach().clone().requires_grad_() for p in method.parameters()]
    method = method.to(DTYPES[recipe.engine.precision])
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)
    size, batch = recipe.data.image_size, _micro_batch(recipe)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        images = torch.randn(batch, 3, size, size, device="cuda")
        method(images, torch.rand(batch, method.noise_size, device="cuda")).loss.backward()
        for master, weight in zip(masters, method.parameters(), strict=True):
            master.grad, weight.grad = (None, None) if weight.grad is None else (weight.grad.float(), None)
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() / GIB
    del method, masters, optimizer
    torch.cuda.empty_cache()
    return peak
