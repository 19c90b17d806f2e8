"""Check 10: images/s and MFU of engine steps, by method, size, micro batch and ZeRO stage.

The processes run `speed_ranks.py`, one per recipe, so that none reuses memory that another has freed. Nothing here
imports torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.gpu_check.check import Context, Finding, Verdict
from pipeline.gpu_check.child import call

METHODS = ("mae", "emae", "efficient_mae", "lomar")
MFU_GOALS = {"vitl16_mae": 0.55, "vith14_mae": 0.60}
"""DESIGN.md's goals on an H100 or H200."""
MICRO_BATCHES = (16, 32, 64, 128, 256, 512, 1024)
TIMEOUT_S = 900.0


def check_speed(context: Context) -> Finding:
    """Measure every paper recipe on one GPU, and ViT-L with each ZeRO stage on all of them."""
    gpu_recipes = [f"{size}_{method}" for size in ("vitl16", "vith14") for method in METHODS]
    recipes, micro_batches, steps = (gpu_recipes, MICRO_BATCHES, 10) if context.on_gpu else (["vitl16_mae"], (2, 4), 2)
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        arguments = {"recipe_name": recipe, "micro_batches": micro_batches, "steps": steps}
        rows += _call(context, "measure_micro_batches", 1, arguments)
    stages = [0, 1, 2, 3] if context.on_gpu else [0, 1]
    arguments = {"recipe_name": "vitl16_mae", "micro_batch": stage_batch(rows), "stages": stages, "steps": steps}
    rows += _call(context, "measure_stages", context.gpus, arguments)
    finding = judge_speed(rows)
    return finding if context.on_gpu else replace(finding, value=f"no GPU: a small model, {finding.value}")


def judge_speed(rows: Sequence[dict[str, Any]]) -> Finding:
    """Compare the best MFU of MAE with the goals. Rows with a `zero_stage` are of the comparison of stages."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (
            "zero_stage" not in row
            and row["images_per_s"] > best.get(row["recipe"], {"images_per_s": 0})["images_per_s"]
        ):
            best[row["recipe"]] = row
    texts: list[str] = []
    verdict: Verdict = "measured"
    for recipe, row in best.items():
        mfu = "" if row["mfu"] is None else f" (MFU {row['mfu']:.0%})"
        texts.append(f"{recipe} {row['images_per_s']:,.0f} images/s{mfu} at {row['micro_batch']}")
    known = [
        (best[recipe]["mfu"], goal) for recipe, goal in MFU_GOALS.items() if recipe in best and best[recipe]["mfu"]
    ]
    if known:
        verdict = "passed" if all(mfu >= goal for mfu, goal in known) else "below goal"
    goals = ", ".join(f"{recipe} {goal:.0%}" for recipe, goal in MFU_GOALS.items())
    return Finding("; ".join(texts), f"goals for the MFU: {goals}", verdict, list(rows))


def stage_batch(rows: Sequence[dict[str, Any]]) -> int:
    """Return the micro batch to compare ZeRO stages at: half of the largest that fits, as stages differ in memory."""
    batches = [row["micro_batch"] for row in rows if row["recipe"] == "vitl16_mae"]
    return max(batches) // 2


def _call(context: Context, function: str, ranks: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return call(
        f"pipeline.gpu_check.speed_ranks:{function}",
        {"context": asdict(context), **arguments},
        device=context.device,
        timeout_s=TIMEOUT_S,
        ranks=ranks,
    )
