"""Stochastic depth without a random generator."""

import torch
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) of one residual branch, decided by given random numbers."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: torch.Tensor | None = None

    def draw(self, uniform: torch.Tensor) -> None:
        """Choose which of B images the next forward drops, from numbers (B,) in [0, 1)."""
        self.keep = (uniform >= self.rate) / (1 - self.rate)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Drop images of a branch (B, ...), or (B * windows, ...) with the windows of an image in sequence."""
        if self.keep is None:
            return branch
        keep = self.keep.repeat_interleave(len(branch) // len(self.keep))
        return branch * keep.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
