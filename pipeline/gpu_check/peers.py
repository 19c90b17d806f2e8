"""Check 13: our step beside transformers' ViTMAE, lightly's MAE and timm's encoder, by benchmarks/step.py.

Nothing here imports torch.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.gpu_check.check import Context, Finding

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "step.py"
PEERS, ENCODERS = ("transformers", "lightly"), ("encoder", "timm encoder")
BOUND = "none: a comparison"


def check_peers(context: Context) -> Finding:
    """Run the benchmark, eager and compiled; on the CPU only a tiny encoder beside timm's."""
    if not BENCHMARK.exists():
        return Finding("benchmarks/ is not part of an installed package; run from a checkout", BOUND, "not checked")
    if not context.on_gpu:
        finding = describe_peers(_run("vit_tiny", 1, 2, ENCODERS, "--device", "cpu"))
        return replace(finding, value=f"no GPU: {finding.value}")
    installed = [peer for peer in PEERS if find_spec(peer)]
    names = ("mae", *ENCODERS, *installed)
    rows = _run("vit_large", 128, 7, names) + _run("vit_large", 128, 7, names, "--compile")
    finding = describe_peers(rows)
    if missing := [peer for peer in PEERS if peer not in installed]:
        return replace(finding, value=f"{finding.value}; not installed: {', '.join(missing)} (make setup, make bench)")
    return finding


def describe_peers(rows: list[dict[str, Any]]) -> Finding:
    """Describe the ratios of the benchmark's rows (`benchmarks/step.py --json`)."""
    texts = []
    for row in rows:
        mode = "compiled" if row["compiled"] else "eager"
        if row["name"] == "mae" and "peer" in row:
            texts.append(f"{mode} MAE: {_format_ratio(row['peer']['ratio'])} {row['peer']['name']}")
        if "timm" in row:
            texts.append(f"{mode} encoder: {_format_ratio(row['timm']['ratio'])} timm's")
    return Finding("; ".join(texts), BOUND, "measured", rows)


def _format_ratio(ratio: list[float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f} x ({low:.2f} to {high:.2f})"


def _run(model: str, batch: int, rounds: int, names: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """Run the benchmark. Returns its rows, with whether they are compiled."""
    command = [sys.executable, str(BENCHMARK), "--json", "--model", model, "--batch", str(batch)]
    command += ["--rounds", str(rounds), "--only", *names, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{BENCHMARK.name}: exit code {done.returncode}")
    return [{**row, "compiled": "--compile" in options} for row in json.loads(done.stdout)["rows"]]
