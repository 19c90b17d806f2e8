"""safetensors files.

Invariant: a file is readable by those who may read its directory; the library alone would restrict it to its
owner.
"""

from pathlib import Path

import torch
from safetensors import numpy as safetensors_numpy
from safetensors.torch import save_file


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a new safetensors file. Raises OSError or SafetensorError if writing fails."""
    save_file(tensors, path, metadata)
    _use_directory_mode(path)


def save_slices(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Like `save_tensors`, for contiguous slices of larger tensors on the host, which it would make the caller copy."""
    safetensors_numpy.save_file({name: tensor.numpy() for name, tensor in tensors.items()}, path, metadata)
    _use_directory_mode(path)


def _use_directory_mode(path: Path) -> None:
    path.chmod(path.parent.stat().st_mode & 0o666)
