"""Batch normalization over all ranks, on GPUs and CPUs (torch's SyncBatchNorm needs a GPU).

Invariant: in training, an image is normalized with mean and variance of the micro batches of all ranks. So outputs
depend on the product of ranks and micro batch and on which images these contain, but not on how the ranks share
them. Running statistics are equal on all ranks. They are updated once per optimizer step, with the statistics of the
whole global batch, and not at all by a step that is skipped.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn


class SyncBatchNorm2d(nn.Module):
    """Batch normalization of images (B, C, H, W), with the parameters and buffers of nn.BatchNorm2d.

    In training every rank calls it, with images of the same shape.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._pending: list[torch.Tensor] = []  # (2, C), mean and variance, of each micro batch of this step
        self._count = 0  # values per channel in a micro batch of all ranks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            return cast(Callable[[torch.Tensor], torch.Tensor], self._normalize)(images)
        return _affine(images, self.running_mean, (self.running_var + self.eps).rsqrt(), self.weight, self.bias)

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        normalized, statistics = _Normalize.apply(images, self.weight, self.bias, self.eps)
        self._pending.append(statistics)
        self._count = images.numel() // images.shape[1] * _world_size()
        return normalized

    @torch.no_grad()
    def update_running_statistics(self, skipped: torch.Tensor) -> None:
        """Update the running statistics with the micro batches since the last call.

        Args:
            skipped: 0-d; 1.0 if the optimizer step was skipped, which leaves them unchanged, else 0.0.
        """
        if not self._pending:
            return
        mean, var = _combine(torch.stack(self._pending))
        total = self._count * len(self._pending)
        var = var * (total / max(total - 1, 1))  # unbiased, as in nn.BatchNorm2d
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            # Not a product with the flag, because statistics of a skipped step may not be finite.
            running.copy_(torch.where(skipped > 0, running, running.lerp(new, self.momentum)))
        self._pending.clear()

    def _apply(self, fn, recurse: bool = True) -> "SyncBatchNorm2d":
        """Keep the running statistics in fp32 if the module is converted to 16 bits."""
        statistics = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = (values.to(self.running_mean.device) for values in statistics)
        return self


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all ranks; also return these, float32 (2, C)."""

    @staticmethod
    def forward(ctx: Any, images, weight, bias, eps):  # pyright: ignore[reportIncompatibleMethodOverride]
        var, mean = torch.var_mean(images.float(), dim=(0, 2, 3), correction=0)
        statistics = _combine(_all_gather(torch.stack([mean, var])))
        mean, var = statistics
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(images, weight, mean, inverse_std)
        ctx.mark_non_differentiable(statistics)
        return _affine(images, mean, inverse_std, weight, bias), statistics

    @staticmethod
    def backward(ctx: Any, gradient, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        images, weight, mean, inverse_std = ctx.saved_tensors
        normalized = (images.float() - _per_channel(mean)) * _per_channel(inverse_std)
        gradient = gradient.float()
        local = torch.stack([gradient.sum((0, 2, 3)), (gradient * normalized).sum((0, 2, 3))])
        # Every rank's loss depends on every rank's images, through the statistics.
        total = local.clone()
        if _world_size() > 1:
            dist.all_reduce(total)
        mean_gradient, mean_product = total * (images.shape[1] / (images.numel() * _world_size()))
        centered = gradient - _per_channel(mean_gradient) - normalized * _per_channel(mean_product)
        of_images = (centered * _per_channel(inverse_std * weight.float())).to(images.dtype)
        of_bias, of_weight = local.to(weight.dtype)
        return of_images, of_weight, of_bias, None


def _affine(images, mean, inverse_std, weight, bias) -> torch.Tensor:
    factor = inverse_std * weight.float()
    return (images.float() * _per_channel(factor) + _per_channel(bias.float() - mean * factor)).to(images.dtype)


def _combine(statistics: torch.Tensor) -> torch.Tensor:
    """Return mean and variance (2, C) of the union of equally large parts, given theirs (R, 2, C)."""
    means, variances = statistics.unbind(1)
    return torch.stack([means.mean(0), variances.mean(0) + means.var(0, correction=0)])


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    """Return every rank's values, stacked in rank order."""
    if _world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values[None, :, None, None]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
