"""The guard's decisions are computed on the device, without copies from the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.recipe.sections import GuardSection
from pipeline.train.guard import Guard

DEVICE = torch.device("meta")


class OperationNames(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_norm_that_is_a_number_is_filled_in_on_the_device():
    """Copying it there, as torch.as_tensor does, would make the host wait."""
    guard = Guard(GuardSection(), "fp32", DEVICE)
    guard.observe_loss(torch.zeros((), device=DEVICE))
    for call, fills in ((lambda: guard.should_skip(1.5), 1), (lambda: guard.record_step(1, 1.5), 2)):
        with OperationNames() as operations:
            call()
        assert operations.names.count("aten.full.default") == fills


def test_a_norm_that_is_a_number_counts_like_a_tensor():
    for norm, skipped in ((1.5, False), (float("inf"), True), (-1.0, True)):
        guard = Guard(GuardSection(), "fp32", torch.device("cpu"))
        guard.observe_loss(torch.zeros(()))
        assert bool(guard.should_skip(norm)) == bool(guard.should_skip(torch.tensor(norm))) == skipped
