"""Exponential moving average (EMA) of the weights, in fp32.

Invariant: the EMA is partitioned like the fp32 weights that the optimizer updates, element by element, on the same
rank and device. So it is saved and restored like them, on any world size and ZeRO stage.
"""

import torch

from pipeline.train import sharded_state


class ModelEma:
    """EMA of the trained weights of a DeepSpeed engine, initialized with the weights.

    Args:
        engine: A DeepSpeed engine.
        decay: In (0.5, 1).
    """

    def __init__(self, engine, decay: float):
        self.decay = decay
        self._weights = [partition.tensor for partition in sharded_state.iter_flat_partitions(engine)]
        self.tensors = [weight.detach().clone() for weight in self._weights]
        """In the order of `sharded_state.iter_flat_partitions`."""

    def update(self, skipped: torch.Tensor) -> None:
        """Update after an optimizer step.

        Args:
            skipped: 0-d; 1.0 if the step was skipped, which leaves the EMA unchanged, else 0.0.
        """
        weight_of_new = (1 - self.decay) * (1 - skipped)
        for average, weight in zip(self.tensors, self._weights, strict=True):
            average.lerp_(weight.detach(), weight_of_new.to(average.device))
