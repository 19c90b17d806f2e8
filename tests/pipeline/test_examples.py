"""The examples of CONTRIBUTING.md run."""

import re
import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent / "examples"


def test_add_a_method_registers_and_trains_a_method(capsys):
    path = EXAMPLES / "add_a_method.py"
    assert len(path.read_text().splitlines()) <= 60
    method = runpy.run_path(str(path))["method"]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    visible, pixels = method.reconstruct(torch.randn(2, 3, 64, 64), torch.rand(2, method.noise_size))
    assert visible.shape == (2, 1, 64) and pixels.isfinite().all()
    assert method.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 65, 128)
