"""The commands of docs/tutorial.md lead to a classifier, with a shorter schedule."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import free_port

from tests.documentation import ROOT, TUTORIAL, blocks

NEEDS_HARDWARE = "## The real thing"
SCHEDULE = {"STEPS": 100, "EPOCHS": 6}


def tutorial_script() -> str:
    """Return the page's shell commands, without those that need hardware except `plan`, and with a free port."""
    page, heading, rest = TUTORIAL.read_text().partition(NEEDS_HARDWARE)
    assert heading
    shell = "".join(text for language, text in blocks(page) if language == "bash")
    for name, value in SCHEDULE.items():
        shell, count = re.subn(rf"^{name}=\d+", f"{name}={value}", shell, flags=re.MULTILINE)
        assert count == 1
    shell = re.sub(r"^deepspeed ", f"deepspeed --master_port {free_port()} ", shell, flags=re.MULTILINE)
    (plan,) = re.findall(r"^python -m pipeline plan .*$", rest, re.MULTILINE)
    return f"set -euo pipefail\n{shell}\n{plan}\n"


def run_script(folder: Path) -> str:
    """Run the script in one shell and return its output."""
    (folder / "demo").symlink_to(ROOT / "demo")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    finished = subprocess.run(
        ["bash", "-c", tutorial_script()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    return finished.stdout


def run_python() -> dict:
    """Run the page's Python code in the working directory and return its variables."""
    variables: dict = {}
    for language, text in blocks(TUTORIAL.read_text()):
        if language == "python":
            exec(text, variables)
    return variables


def read_top1(run: str) -> float:
    return json.loads(Path(run, "results.json").read_text())["top1"]["accuracy"]


@pytest.mark.soak
def test_tutorial_leads_to_a_classifier(tmp_path, monkeypatch, capsys):
    output = run_script(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "Traceback" not in output
    assert "shards/train: complete; 384 samples" in output and "384 samples in 1 shards, 0 repaired" in output
    assert {path.name for path in Path("pictures").iterdir()} == {
        f"small-{kind}.png" for kind in ("grid", "attention", "features")
    }
    assert output.count("training images (0.02 of the labels") == 3 and output.count("<- chosen") == 1
    assert Path("runs/small/report.html").exists() and Path("comparison.html").exists()
    chance = 1 / 6
    assert read_top1("runs/tuned") > 3 * chance and read_top1("runs/scratch") > chance
    variables = run_python()
    predicted, shape = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([1, 128])" and predicted in label_names(variables["classifier"])
    top1 = timm_top1(variables)
    assert top1 == pytest.approx(read_top1("runs/tuned"), abs=0.03)  # timm's transforms compute other pixels


def label_names(classifier) -> list[str]:
    return classifier.pretrained_cfg["label_names"]


def timm_top1(variables: dict) -> float:
    """Return the top-1 accuracy on val/ of the classifier in the page's variables."""
    photographs = sorted(Path("val").glob("*/*"))
    assert len(photographs) == 96
    images = torch.stack([variables["transform"](Image.open(p).convert("RGB")) for p in photographs])
    with torch.inference_mode():
        predicted = variables["classifier"](images).argmax(dim=1).tolist()
    names = [label_names(variables["classifier"])[label] for label in predicted]
    return sum(name == p.parent.name for name, p in zip(names, photographs, strict=True)) / len(photographs)
