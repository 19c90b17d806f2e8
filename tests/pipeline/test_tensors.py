"""Permissions of safetensors files."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.io.tensors import save_slices, save_tensors


@pytest.mark.parametrize(("directory", "file"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_readers_of_the_directory_can_read_the_file(tmp_path, directory, file):
    tmp_path.chmod(directory)
    path = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o777 == file and load_file(path)["a"].tolist() == [1, 1]


def test_slices_of_one_tensor_are_written_as_copies_would_be(tmp_path):
    flat, metadata = torch.arange(10.0), {"ranges": "{}"}
    slices = {"b": flat[:4], "a": flat[2:9]}
    save_slices(slices, tmp_path / "slices", metadata)
    save_tensors({name: tensor.clone() for name, tensor in slices.items()}, tmp_path / "copies", metadata)
    assert (tmp_path / "slices").read_bytes() == (tmp_path / "copies").read_bytes()
    assert load_file(tmp_path / "slices")["a"].tolist() == list(range(2, 9))
