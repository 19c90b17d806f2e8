"""Recommended settings for the machine, derived from the rows that the checks measured.

Invariant: every recommendation follows from a measured row; without one there is none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

NEAR_BEST = 0.97
"""Share of the best throughput that is as good as the best: the smaller setting is then recommended."""
MIN_COMPILE_GAIN = 1.05
LOADER_FACTOR = 1.2
"""How much faster than the engine the loader has to be."""

Rows = Sequence[Mapping[str, Any]]


def recommend(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the recommended recipe keys: `engine.micro_batch` by recipe, the others for all.

    Args:
        findings: The checks' findings by name, as JSON.
    """
    speed = _rows(findings, "engine-speed")
    recommended: dict[str, Any] = {}
    batches = [row for row in speed if "zero_stage" not in row]
    if batches:
        recommended["engine.micro_batch"] = {
            recipe: best_micro_batch([row for row in batches if row["recipe"] == recipe])
            for recipe in dict.fromkeys(row["recipe"] for row in batches)
        }
    stages = [row for row in speed if "zero_stage" in row]
    if stages:
        recommended["engine.zero_stage"] = _smallest_near_best(stages, "zero_stage")
    compiled = _rows(findings, "compile")
    if compiled:
        passed = findings["compile"]["verdict"] == "passed"
        recommended["engine.compile"] = passed and compiled[0]["speed_up"] >= MIN_COMPILE_GAIN
    threads = _rows(findings, "loader-speed")
    if threads:
        demand = max((row["images_per_s"] for row in batches if row["recipe"] == "vitl16_mae"), default=None)
        recommended["data.decode_threads"] = best_threads(threads, demand)
    return recommended


def best_micro_batch(rows: Rows) -> int:
    """Return the smallest micro batch whose throughput is near the best."""
    return _smallest_near_best(rows, "micro_batch")


def best_threads(rows: Rows, demand: float | None) -> int:
    """Return the smallest number of threads that feeds the engine, else the smallest near the best.

    Args:
        demand: images/s of the engine, None if unknown.
    """
    enough = [row["threads"] for row in rows if demand and row["images_per_s"] >= LOADER_FACTOR * demand]
    return min(enough) if enough else _smallest_near_best(rows, "threads")


def _smallest_near_best(rows: Rows, key: str) -> int:
    best = max(row["images_per_s"] for row in rows)
    return min(row[key] for row in rows if row["images_per_s"] >= NEAR_BEST * best)


def _rows(findings: Mapping[str, Mapping[str, Any]], check: str) -> Rows:
    finding = findings.get(check)
    return finding["rows"] if finding and finding["verdict"] != "failed" else []
