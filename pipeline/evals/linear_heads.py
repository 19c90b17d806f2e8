"""The probe's linear classifiers: many on the same features, each with a learning rate of its own.

MAE's protocol (He et al. 2022, A.1, and main_linprobe.py): batch normalisation without affine before a
linear layer, LARS (You et al. 2017) without weight decay. Invariant: heads do not know of each other: what
one learns at its rate is what it would learn alone.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-6
WEIGHT_STD = 0.01
MOMENTUM = 0.9
TRUST = 0.001
"""LARS: a step's length over the weights', at a learning rate of one."""


class LinearHeads(nn.Module):
    """K linear classifiers of D features into C classes."""

    def __init__(self, rates: Sequence[float], classes: int, width: int) -> None:
        """rates: the learning rates' ratios to each other, one a head."""
        super().__init__()
        self.rates = tuple(rates)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        first = nn.init.trunc_normal_(torch.empty(classes, width), std=WEIGHT_STD)
        count = len(self.rates)
        self.register_buffer("weight", first.repeat(count, 1, 1))
        self.register_buffer("bias", torch.zeros(count, classes))
        self.register_buffer("weight_momentum", torch.zeros_like(self.weight))
        self.register_buffer("bias_momentum", torch.zeros_like(self.bias))

    def forward(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """Scores (B, C) by one head of features (B, D)."""
        return F.linear(self.norm(features), self.weight[head], self.bias[head])

    def train_step(self, features: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        """One step of every head on features (B, D) and labels (B,), at `rate` times its own: losses (K,)."""
        features = self.norm(features)
        losses = []
        for head, own in enumerate(self.rates):
            weight, bias = (tensor[head].detach().requires_grad_() for tensor in (self.weight, self.bias))
            loss = F.cross_entropy(F.linear(features, weight, bias), labels)
            by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
            length, change = weight.detach().norm(), by_weight.norm()
            trust = torch.where((length > 0) & (change > 0), TRUST * length / change, 1.0)
            self.weight_momentum[head].mul_(MOMENTUM).add_(by_weight * trust)
            self.bias_momentum[head].mul_(MOMENTUM).add_(by_bias)
            self.weight[head].add_(self.weight_momentum[head], alpha=-rate * own)
            self.bias[head].add_(self.bias_momentum[head], alpha=-rate * own)
            losses.append(loss.detach())
        return torch.stack(losses)
