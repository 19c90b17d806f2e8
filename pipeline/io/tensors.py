"""safetensors files.

Invariant: who may read the directory may read the file; the library makes it for its owner alone.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write a new file. about: its metadata. OSError or SafetensorError where the storage says no."""
    save_file(tensors, path, about)
    path.chmod(path.parent.stat().st_mode & 0o666)
