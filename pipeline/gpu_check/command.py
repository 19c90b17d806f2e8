"""Run the checks one after another, show progress, and report. Imports no heavy library and uses no GPU itself."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.gpu_check.check import Context, Finding
from pipeline.gpu_check.child import ChildError, call
from pipeline.gpu_check.recommend import recommend
from pipeline.gpu_check.registry import CHECKS, Check
from pipeline.gpu_check.report import format_checks, format_machine, format_measurements, format_recommended
from pipeline.io.atomic import write_json

logger = logging.getLogger(__name__)
CPU_RANKS = 2
NUM_IMAGES, SIDE = {"cuda": 512, "cpu": 96}, {"cuda": 440, "cpu": 120}
"""Synthetic images, and their typical side in pixels."""
CPU_TIMEOUT_S = 600.0


def gpu_check(
    device: Literal["cuda", "cpu"],
    data: str | None = None,
    gpus: int | None = None,
    json_file: Path | None = None,
    checks: Sequence[Check] = CHECKS,
) -> bool:
    """Run the checks and print a report.

    Args:
        device: "cpu" runs every check at reduced size, to test the checks.
        data: Shard set for pixels and measurements; None: synthetic images.
        gpus: GPUs (on the CPU: processes) of the checks that use several; None: all, on the CPU two.
        json_file: File for the report as JSON.
        checks: What to run, in this order.

    Returns:
        Whether no check failed.

    Raises:
        UserError: If there is no such GPU or shard set, or several ranks were launched.
    """
    _check_arguments(data, json_file)
    machine = _describe_machine(device, gpus)
    print(format_machine(machine, device), flush=True)
    findings: dict[str, dict[str, Any]] = {}
    outputs: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder, _Progress(len(checks)) as progress:
        progress.start("sample images")
        context = _make_context(device, data, gpus or (len(machine["gpus"]) if device == "cuda" else CPU_RANKS), folder)
        for check in checks:
            rows = {name: finding["rows"] for name, finding in findings.items()}
            progress.start(check.name)
            try:
                findings[check.name] = _run(check, replace(context, rows=rows), progress)
            except ChildError as error:
                findings[check.name] = asdict(Finding(str(error), "ends with a result", "failed"))
                outputs[check.name] = error.output
            progress.end(findings[check.name]["verdict"])
    for name, output in outputs.items():
        print(f"---- {name}: its last lines\n{output}", file=sys.stderr)
    recommended = recommend(findings)
    blocks = [format_checks(findings), format_measurements(findings), format_recommended(recommended, device)]
    print("\n\n".join(filter(None, blocks)))
    if json_file:
        write_json(json_file, _as_json(machine, findings, recommended))
    return all(finding["verdict"] != "failed" for finding in findings.values())


def _check_arguments(data: str | None, json_file: Path | None) -> None:
    if any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        raise UserError("gpu-check: starts its ranks itself; run it once per node, without a launcher")
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: {json_file.parent} is no directory; create it")
    if data is not None:
        from pipeline.data.reader import check_sources
        from pipeline.recipe.sections import Source

        check_sources([Source(path=data)])


def _describe_machine(device: str, gpus: int | None) -> dict[str, Any]:
    machine = call("pipeline.gpu_check.machine:describe", {}, device=device, timeout_s=CPU_TIMEOUT_S)
    found = len(machine["gpus"])
    if device == "cuda" and not found:
        raise UserError(
            "gpu-check: torch finds no GPU; run it on a machine with one, or test the checks by --device cpu"
        )
    if device == "cuda" and gpus and gpus > found:
        raise UserError(f"--gpus {gpus}: torch finds {found}; give at most that")
    return machine


def _make_context(device: Literal["cuda", "cpu"], data: str | None, gpus: int, folder: str) -> Context:
    from pipeline.gpu_check.sample_images import build_shard_set

    photographs = str(build_shard_set(Path(folder, "samples"), NUM_IMAGES[device], SIDE[device]))
    scratch = Path(folder, "scratch")
    scratch.mkdir()
    return Context(device, gpus, photographs, data or photographs, str(scratch))


def _run(check: Check, context: Context, progress: "_Progress") -> dict[str, Any]:
    timeout_s = check.timeout_s if context.on_gpu else CPU_TIMEOUT_S
    arguments = {"function": check.function, "context": asdict(context)}
    function = "pipeline.gpu_check.check:run_check_as_json"
    return call(function, arguments, device=context.device, timeout_s=timeout_s, on_poll=progress.refresh)


def _as_json(
    machine: dict[str, Any], findings: dict[str, dict[str, Any]], recommended: dict[str, Any]
) -> dict[str, Any]:
    return {
        "machine": machine,
        "checks": [
            {"name": name, **{key: finding[key] for key in ("value", "bound", "verdict")}}
            for name, finding in findings.items()
        ],
        "measured": {name: finding["rows"] for name, finding in findings.items() if finding["rows"]},
        "recommended": recommended,
    }


class _Progress:
    """A progress bar on a terminal, elsewhere a log line per check."""

    def __init__(self, num_checks: int):
        self._num_checks, self._done = num_checks, 0
        self._name, self._started = "", 0.0
        self._bar = tqdm(total=num_checks, unit="check", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, name: str) -> None:
        self._name, self._started = name, time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._name} {time.monotonic() - self._started:.0f} s")

    def end(self, verdict: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        else:
            seconds = time.monotonic() - self._started
            logger.info(f"check {self._done} of {self._num_checks}, {self._name}: {verdict}, {seconds:.0f} s")
