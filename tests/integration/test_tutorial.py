"""docs/tutorial.md, followed: the commands of its fenced blocks, with a shorter schedule."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.documentation import ROOT, TUTORIAL, blocks

HARDWARE = "## The real thing"
SCHEDULE = {"STEPS": 100, "EPOCHS": 6}


def script() -> str:
    """The shell's blocks, up to what needs hardware, and of that the line that only counts."""
    page, heading, rest = TUTORIAL.read_text().partition(HARDWARE)
    assert heading
    shell = "".join(text for language, text in blocks(page) if language == "bash")
    for name, value in SCHEDULE.items():
        shell, found = re.subn(rf"^{name}=\d+", f"{name}={value}", shell, flags=re.MULTILINE)
        assert found == 1
    (plan,) = re.findall(r"^python -m pipeline plan .*$", rest, re.MULTILINE)
    return f"set -euo pipefail\n{shell}\n{plan}\n"


def follow(folder: Path) -> str:
    """Type all that into one shell; returns what was said."""
    (folder / "demo").symlink_to(ROOT / "demo")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def session() -> dict:
    """Run the page's Python as one session in the working directory; returns its variables."""
    variables: dict = {}
    for language, text in blocks(TUTORIAL.read_text()):
        if language == "python":
            exec(text, variables)
    return variables


def top1(run: str) -> float:
    return json.loads(Path(run, "accuracy.json").read_text())["top1"]["accuracy"]


@pytest.mark.soak
def test_the_tutorial_leads_to_a_classifier(tmp_path, monkeypatch, capsys):
    said = follow(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "Traceback" not in said
    assert "shards/train: whole; 384 samples" in said and "384 samples in 1 shards, 0 repaired" in said
    assert {path.name for path in Path("pictures").iterdir()} == {
        f"small-{kind}.png" for kind in ("grid", "attention", "features")
    }
    assert said.count("training images (0.02 of the labels") == 3 and said.count("<- chosen") == 1
    assert Path("runs/small/report.html").exists() and Path("comparison.html").exists()
    chance = 1 / 6
    assert top1("runs/tuned") > 3 * chance and top1("runs/scratch") > chance
    variables = session()
    answer, shape = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([1, 128])" and answer in names_of(variables["classifier"])
    assert timms_top1(variables) == pytest.approx(top1("runs/tuned"), abs=0.03)  # pixels are other libraries'


def names_of(classifier: torch.nn.Module) -> list[str]:
    return classifier.pretrained_cfg["label_names"]


def timms_top1(variables: dict) -> float:
    """Share of val/ that the session's classifier knows."""
    photographs = sorted(Path("val").glob("*/*"))
    assert len(photographs) == 96
    images = torch.stack([variables["transform"](Image.open(p).convert("RGB")) for p in photographs])
    with torch.inference_mode():
        found = variables["classifier"](images).argmax(dim=1).tolist()
    names = [names_of(variables["classifier"])[label] for label in found]
    return sum(name == p.parent.name for name, p in zip(names, photographs, strict=True)) / len(photographs)
