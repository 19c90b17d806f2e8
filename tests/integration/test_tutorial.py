"""docs/tutorial.md, followed: its commands as they stand in its fenced blocks, with a shorter schedule."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation import ROOT, TUTORIAL, blocks

HARDWARE = "## The real thing"
SCHEDULE = {"STEPS": 100, "EPOCHS": 6}


def script() -> str:
    """The page up to what needs hardware, as one shell script; its Python blocks are one program at the end
    of it, as in one session of a reader."""
    page, heading, rest = TUTORIAL.read_text().partition(HARDWARE)
    assert heading
    shell = "".join(text for language, text in blocks(page) if language == "bash")
    for name, value in SCHEDULE.items():
        shell, found = re.subn(rf"^{name}=\d+", f"{name}={value}", shell, flags=re.MULTILINE)
        assert found == 1
    python = "".join(text for language, text in blocks(page) if language == "python")
    (plan,) = re.findall(r"^python -m pipeline plan .*$", rest, re.MULTILINE)
    return f"set -euo pipefail\n{shell}\n{plan}\npython - <<'PYTHON'\n{python}PYTHON\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which a reader has followed the page, and what was said."""
    folder = tmp_path_factory.mktemp("tutorial")
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
    return folder, done.stdout


def top1(run: Path) -> float:
    return json.loads((run / "accuracy.json").read_text())["top1"]["accuracy"]


@pytest.mark.soak
def test_the_tutorial_leads_to_a_classifier(place):
    folder, said = place
    assert "Traceback" not in said
    assert "shards/train: whole; 384 samples" in said and "384 samples in 1 shards, 0 repaired" in said
    assert len(list((folder / "val").rglob("*.jpg"))) == 96
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        f"small-{kind}.png" for kind in ("grid", "attention", "features")
    }
    chance = 1 / 6
    assert top1(folder / "runs/tuned") > 3 * chance and (folder / "runs/scratch/accuracy.json").exists()
    assert len(re.findall(r"<- chosen", said)) == 1 and said.count("training images (0.02 of the labels") == 3
    assert (folder / "runs/small/report.html").exists() and (folder / "comparison.html").exists()
    shape, answer = said.splitlines()[-2:]
    photo = next((folder / "val").glob("*/*"))
    assert shape == "torch.Size([1, 128])" and answer in {path.name for path in photo.parent.parent.iterdir()}
