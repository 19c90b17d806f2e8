"""Reading metrics.jsonl, and the kinds of its columns.

Invariant: all columns except TIMING_COLUMNS depend only on the recipe, the data and the world size.
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
    "memory_used",
    "rank_time",
    "slowest_time",
    "slowest_rank",
    "slowest_host",
}
"""Columns that measure time, speed or memory."""
NON_LOSS_COLUMNS = TIMING_COLUMNS | {
    "step",
    "epoch",
    "samples",
    "lr",
    "grad_norm",
    "skipped",
    "skipped_steps",
    "undecodable",
    "decoded_patches",
    "miou",
    "macc",
    "aacc",
    "iou",
}
"""Columns that are neither the loss, nor a term of it, nor an accuracy with an interval."""
RENAMED_COLUMNS = {"skips": "skipped_steps", "replaced": "undecodable", "trouble": "bad_span"}
"""Old names of columns, in files of earlier versions, and the present names."""


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """Read the lines of a run's metrics.jsonl. An incomplete last line, as a killed run leaves it, is
    ignored.

    Returns:
        The valid lines, and the number of invalid ones.
    """
    text, _, _ = path.read_text(errors="replace").rpartition("\n")
    lines = [_parse_line(line) for line in text.splitlines()]
    valid = [line for line in lines if line]
    return valid, len(lines) - len(valid)


def _parse_line(line: str) -> dict | None:
    try:
        entry = {RENAMED_COLUMNS.get(name, name): value for name, value in json.loads(line).items()}
        if entry.get("event") == "return":
            entry["event"] = "rollback"
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
