"""Permissions of safetensors files."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.io.tensors import save_tensors


@pytest.mark.parametrize(("directory", "file"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_readers_of_the_directory_can_read_the_file(tmp_path, directory, file):
    tmp_path.chmod(directory)
    path = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o777 == file and load_file(path)["a"].tolist() == [1, 1]
