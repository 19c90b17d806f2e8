"""Interface between the trainer and a model: a module that maps a batch and its noise to a loss.

Invariant: a trainable module has no state but its weights and persistent buffers, which checkpoints hold, and all
randomness enters through the noise. The loss is the mean over images of a per-image loss, so it does not depend on how
a batch is split (with batch normalization, see `distributed.sync_batch_norm`).
"""

from typing import Any, NamedTuple

import torch
from torch import nn


class LossOutput(NamedTuple):
    """Output of a trainable module's forward pass; methods return more (`methods.method.MethodOutput`).

    A named tuple, because ZeRO-3 traverses and rebuilds a module's outputs.
    """

    loss: torch.Tensor
    """float32 scalar, with the gradient."""
    metrics: dict[str, torch.Tensor]
    """Parts of the loss and other values to log; 0-d, detached."""


class TrainableModule(nn.Module):
    """Module that the trainer can train.

    Its forward takes images, float32 (B, 3, H, W); noise, float32 (B, noise_size) in [0, 1); and, for a
    labeled task, labels, int64 (B,), or, for a task with a `transform`, the targets, a list of B dictionaries. It
    returns a `LossOutput`, or a named tuple that has its fields and more.
    """

    noise_size: int
    """Uniform [0, 1) numbers needed per image."""

    def set_training_progress(self, progress: float) -> None:
        """Receive the fraction of training that is done, in [0, 1], before each step. Must not synchronize
        with the device."""

    def update_buffers(self, skipped: torch.Tensor) -> None:
        """Update buffers such as running statistics, after each optimizer step. Must not synchronize with the device.

        Args:
            skipped: 0-d; 1.0 if the step was skipped, and buffers must not change; else 0.0.
        """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the trained parameters, each in exactly one group, in the format of torch's optimizers.

        As in the official MAE code, biases and norms are not decayed. A group's "lr_scale", if present,
        multiplies the scheduled learning rate.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
