"""Linear classifiers on shared features, each with its own learning rate, trained together.

MAE's protocol (He et al. 2022, A.1, and main_linprobe.py): batch normalization without affine parameters before
a linear layer, LARS (You et al. 2017) without weight decay.
Invariant: heads are independent; each learns what it would learn alone at its learning rate.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-6
WEIGHT_STD = 0.01
MOMENTUM = 0.9
TRUST = 0.001
"""LARS' trust coefficient."""


class LinearHeads(nn.Module):
    """K linear classifiers of D = `width` features, with a factor of the learning rate each (`rates`)."""

    weight: torch.Tensor
    bias: torch.Tensor
    weight_momentum: torch.Tensor
    bias_momentum: torch.Tensor

    def __init__(self, rates: Sequence[float], classes: int, width: int) -> None:
        super().__init__()
        self.rates = tuple(rates)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        weight = nn.init.trunc_normal_(torch.empty(classes, width), std=WEIGHT_STD)
        count = len(self.rates)
        self.register_buffer("weight", weight.repeat(count, 1, 1))
        self.register_buffer("bias", torch.zeros(count, classes))
        self.register_buffer("weight_momentum", torch.zeros_like(self.weight))
        self.register_buffer("bias_momentum", torch.zeros_like(self.bias))

    def forward(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """Return one head's scores (B, C) for features (B, D)."""
        return F.linear(self.norm(features), self.weight[head], self.bias[head])

    def train_step(self, features: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        """Update every head on features (B, D) and labels (B,) at `rate` times its factor; return losses (K,)."""
        features = self.norm(features)
        losses = []
        for head, factor in enumerate(self.rates):
            weight, bias = (tensor[head].detach().requires_grad_() for tensor in (self.weight, self.bias))
            loss = F.cross_entropy(F.linear(features, weight, bias), labels)
            weight_grad, bias_grad = torch.autograd.grad(loss, (weight, bias))
            # As MAE's LARS. timm.optim.Lars adds an eps to the trust ratio's denominator.
            norm, grad_norm = weight.detach().norm(), weight_grad.norm()
            trust = torch.where((norm > 0) & (grad_norm > 0), TRUST * norm / grad_norm, 1.0)
            self.weight_momentum[head].mul_(MOMENTUM).add_(weight_grad * trust)
            self.bias_momentum[head].mul_(MOMENTUM).add_(bias_grad)
            self.weight[head].add_(self.weight_momentum[head], alpha=-rate * factor)
            self.bias[head].add_(self.bias_momentum[head], alpha=-rate * factor)
            losses.append(loss.detach())
        return torch.stack(losses)
