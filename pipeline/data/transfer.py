"""Copies of small tensors from the host to the device.

Invariant: a copy to a GPU starts from page-locked memory, so the host does not wait for the work that the GPU has
queued. From pageable memory it may, even with `non_blocking=True`.
"""

import torch


def pin_for(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor in page-locked memory if `device` is a GPU, otherwise itself."""
    if device.type != "cuda" or not tensor.numel():
        return tensor
    with torch.cuda.device(device):  # a thread that did not set its device would initialize GPU 0
        return tensor.pin_memory()


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without waiting for it."""
    return pin_for(tensor, device).to(device, non_blocking=True)
