"""An exponential moving average of the weights, in fp32.

Invariant: it lies beside the fp32 weights that the optimiser updates, element by element, on the same rank
and device. So it is saved and restored as they are, on any number of ranks, and does not depend on how they
are shared out.
"""

import torch

from pipeline.train import sharded_state


class ModelEma:
    """Of a DeepSpeed engine's trained weights; begins as they are. decay: in (0.5, 1)."""

    def __init__(self, model, decay: float):
        self.decay = decay
        self._weights = [flat.tensor for flat in sharded_state.iter_flat_partitions(model)]
        self.tensors = [weight.detach().clone() for weight in self._weights]
        """In the order of `elastic.flats`."""

    def update(self, skipped: torch.Tensor) -> None:
        """After the optimiser's step. skipped: 1.0 where it was left out, and the average stays, else 0.0."""
        share = (1 - self.decay) * (1 - skipped)
        for model_ema, weight in zip(self.tensors, self._weights, strict=True):
            model_ema.lerp_(weight.detach(), share.to(model_ema.device))
