"""The report of `gpu-check`: a table of the checks, the measurements, and the recommended settings."""

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

NAME_WIDTH, VERDICT_WIDTH = 17, 13
COLUMNS = ("recipe", "zero_stage", "micro_batch", "ranks", "threads", "images_per_s", "mfu", "launches", "host_wait_ms")
"""Of the measured rows, in this order if they have them."""


def format_machine(machine: Mapping[str, Any], device: str) -> str:
    """Describe the machine in one line."""
    if device == "cpu":
        return f"gpu-check on the CPU, {machine['cores']} cores: this tests the checks, not a GPU"
    names = ", ".join(dict.fromkeys(machine["gpus"]))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpus = f"{len(machine['gpus'])} x {names}, {machine['memory_gib'][0]} GiB"
    return f"gpu-check on {gpus}; CUDA {machine['cuda']}; {versions}"


def format_checks(findings: Mapping[str, Mapping[str, Any]]) -> str:
    """Format name, verdict, value and bound of each check."""
    width = max(40, shutil.get_terminal_size((120, 24)).columns - NAME_WIDTH - VERDICT_WIDTH)
    indent = " " * (NAME_WIDTH + VERDICT_WIDTH)
    lines = [f"{'check':<{NAME_WIDTH}}{'verdict':<{VERDICT_WIDTH}}value; bound"]
    for name, finding in findings.items():
        wrapped = [*textwrap.wrap(finding["value"], width), *textwrap.wrap(f"bound: {finding['bound']}", width)]
        lines.append(f"{name:<{NAME_WIDTH}}{finding['verdict']:<{VERDICT_WIDTH}}{wrapped[0]}")
        lines += [indent + line for line in wrapped[1:]]
    return "\n".join(lines)


def format_measurements(findings: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the throughput rows of engine-speed and loader-speed, empty if there are none."""
    blocks = []
    for check in ("engine-speed", "loader-speed"):
        rows = findings[check]["rows"] if check in findings else []
        if rows:
            columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
            table = [columns, *([_cell(name, row.get(name)) for name in columns] for row in rows)]
            widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
            blocks.append(f"{check}:")
            blocks += ["".join(f"{cell:>{size}}" for cell, size in zip(row, widths, strict=True)) for row in table]
    return "\n".join(blocks)


def format_recommended(recommended: Mapping[str, Any], device: str) -> str:
    """Format the recommended settings as options of the command line."""
    lines = ["recommended, from the rows above" + (" (of a small model on the CPU)" if device == "cpu" else "") + ":"]
    for key, value in recommended.items():
        if isinstance(value, Mapping):
            lines += [f"  {recipe:<22}--set {key}={setting}" for recipe, setting in value.items()]
        else:
            lines.append(f"  {'every recipe':<22}--set {key}={str(value).lower()}")
    return "\n".join(lines) if recommended else "recommended: nothing, because nothing was measured"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
