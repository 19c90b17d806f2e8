"""What a checkpoint holds goes from every kind of engine into every other without the loss of a bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = 6  # ZeRO 0, 1, 2, 3, and 2 and 3 with offload


@pytest.mark.parametrize(
    ("ranks", "pairs"), [(1, 2 * KINDS), pytest.param(2, KINDS**2, marks=pytest.mark.soak)]
)
def test_weights_moments_and_averages_are_carried_between_stages_with_and_without_offload(ranks, pairs):
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--module",
    ]
    finished = subprocess.run(
        [*([sys.executable, "-m"] if ranks == 1 else launcher), "carried_state", *["all"] * (ranks > 1)],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's Muon would be compiled for every shape
        },
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert finished.stdout.count("carried ") == ranks * (pairs + 1)
    assert ranks > 1 or "average as defined" in finished.stdout
