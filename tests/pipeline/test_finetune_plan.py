"""The estimates of `plan` for detection: the published FLOPs, the recipe's hours, and memory at 1024 px."""

import json
import re

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.recipe.loading import PRESETS_DIR
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.finetune_plan import plan_finetune


def test_vitdet_b_costs_what_was_published(capsys):
    assert main(["plan", "detect_vitb16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["forward_gflops"] / 2e3 == pytest.approx(0.8, abs=0.05)  # ViTDet, Table 6: 0.8 T multiply-adds
    assert plan["image_size"] == 1024 and 110e6 < plan["parameters"] < 115e6
    states = [memory["states"] for memory in plan["memory"]]
    assert states == sorted(states, reverse=True) and states[0] == pytest.approx(plan["parameters"] * 18 / 2**30)
    assert 2 < plan["activations_gib"] < 20 and plan["memory"][1]["largest_micro_batch"] >= plan["micro_batch"]
    header = (PRESETS_DIR / "detect_vitb16.yaml").read_text()
    hours, gpus, percent = map(
        float, re.search(r"([\d.]+) hours on (\d+) H100 at an assumed MFU of (\d+)", header).groups()
    )
    assert (plan["gpus"], plan["mfu"]) == (gpus, percent / 100) and hours == pytest.approx(plan["hours"], abs=0.06)


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("finetune_vitb16", [], "classification"),
        ("detect_tiny", [], "detector.encoder"),
        ("detect_vitb16", [], "--gpu"),
    ],
)
def test_what_cannot_be_planned_is_an_error(name, overrides, named):
    with pytest.raises(UserError, match=named):
        plan_finetune(load_finetune_recipe(name, "", overrides), gpus=8, nodes=1, gpu="h1000", mfu=0.4)
