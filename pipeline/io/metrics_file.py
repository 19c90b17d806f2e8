"""metrics.jsonl: its lines, and its columns by what they speak of.

Invariant: every column but those OF_THE_MOMENT is a function of recipe, data and number of ranks.
"""

import json
from pathlib import Path

TIMING_COLUMNS = {
    "time",
    "images_per_s",
    "images_per_s_rank",
    "data_wait",
    "mfu",
    "memory",
    "rank_time",
    "slowest_time",
    "slowest_rank",
    "slowest_host",
}
"""How fast it went, and when."""

NO_LOSS = TIMING_COLUMNS | {
    "step",
    "epoch",
    "samples",
    "lr",
    "grad_norm",
    "skipped",
    "skipped_steps",
    "undecodable",
    "decoded_patches",  # of Efficient MAE: a count
}
"""What is neither the loss, nor a part of it, nor an accuracy."""


RENAMED = {"skips": "skipped_steps", "replaced": "undecodable", "trouble": "bad_span"}
"""Column names of earlier versions, and the names now."""


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The file's lines, and how many others are no line of a run's; without a last one that is being written,
    or that a kill cut short."""
    text, _, _ = path.read_text(errors="replace").rpartition("\n")
    lines = [_parsed(line) for line in text.splitlines()]
    whole = [line for line in lines if line]
    return whole, len(lines) - len(whole)


def _parsed(line: str) -> dict | None:
    try:
        entry = {RENAMED.get(name, name): value for name, value in json.loads(line).items()}
        if entry.get("event") == "return":
            entry["event"] = "rollback"
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
