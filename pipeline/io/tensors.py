"""safetensors files.

Invariant: a file is readable by those who may read its directory; the library alone would restrict it to its
owner.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a new safetensors file. Raises OSError or SafetensorError if writing fails."""
    save_file(tensors, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)
