"""What the loop trains: a module from a batch and its noise to a loss.

Invariant: a learner has no state but its weights, and all randomness enters by the noise. The loss is the
mean over images of a per-image loss, so it does not depend on how a batch is cut.
"""

from torch import nn


class TrainableModule(nn.Module):
    """Its forward takes images (B, 3, H, W) float32, noise (B, noise_size) float32 in [0, 1) and, where its
    task is labelled, labels (B,) int64. It returns a named tuple with `loss`, a float32 scalar, and
    `metrics`, a dictionary of detached 0-d tensors."""

    noise_size: int
    """Uniform [0, 1) numbers wanted per image."""

    def set_training_progress(self, done: float) -> None:
        """Where training stands, from 0 to 1. Called before a step; it does not wait for the device."""

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """The trained parameters as an optimiser takes them, each in one group; "lr_scale" multiplies the
        schedule's rate. As in the official MAE code, biases and norms are not decayed."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
