"""Check 8: a run that is killed with SIGKILL and resumed has the losses of an uninterrupted one.

The runs are real: `pretrain`, started by torchrun as users start it. Nothing here imports torch.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.gpu_check.check import REDUCED, Context, Finding, judge, largest_difference
from pipeline.gpu_check.child import ChildError, run

STEPS, CHECKPOINT_EVERY, KILL_AT = 40, 10, 12
FEWER_RANKS_BOUND = 1e-5
"""Largest relative difference of a loss on fewer ranks, as DESIGN.md promises."""
TIMEOUT_S = 600.0

Losses = Sequence[tuple[int, float]]
"""(step, loss)"""


def check_resume(context: Context) -> Finding:
    """Train, train again with a kill and a resume, and resume the killed run on fewer ranks."""
    folder = context.scratch
    uninterrupted, killed, fewer = (folder / name for name in ("uninterrupted", "killed", "fewer"))
    _pretrain(context, uninterrupted, context.gpus)
    _pretrain(context, killed, context.gpus, kill_at=KILL_AT)
    last_step = _losses(killed)[-1][0]
    if last_step == STEPS:
        raise RuntimeError(f"the run reached step {STEPS} before it was killed")
    shutil.copytree(killed, fewer)
    _pretrain(context, killed, context.gpus)
    expected, resumed, on_fewer = _losses(uninterrupted), _losses(killed), None
    if context.gpus > 1:
        ranks = next(number for number in range(context.gpus - 1, 0, -1) if context.gpus % number == 0)
        _pretrain(context, fewer, ranks)
        on_fewer = _losses(fewer)
    finding = judge_losses(expected, resumed, on_fewer)
    return replace(finding, value=f"killed after step {last_step}; {finding.value}")


def judge_losses(expected: Losses, resumed: Losses, on_fewer: Losses | None) -> Finding:
    """Compare the losses of a resumed run, and of one on fewer ranks, with those of an uninterrupted run."""
    same = list(resumed) == list(expected)
    value = f"same ranks: {'equal to the bit' if same else f'differ by {_largest_difference(resumed, expected):.1e}'}"
    passed = same
    if on_fewer is None:
        value += "; fewer ranks: not checked with one GPU"
    else:
        difference = _largest_difference(on_fewer, expected)
        value += f"; fewer ranks: differ by {difference:.1e}"
        passed = passed and difference <= FEWER_RANKS_BOUND
    return Finding(value, f"same ranks: equal; fewer ranks: {FEWER_RANKS_BOUND:.0e}", judge(passed))


def _largest_difference(losses: Losses, expected: Losses) -> float:
    if [step for step, _ in losses] != [step for step, _ in expected]:
        return math.inf
    return largest_difference([loss for _, loss in losses], [loss for _, loss in expected])


def _pretrain(context: Context, directory: Path, ranks: int, kill_at: int | None = None) -> None:
    """Run `pretrain`; with `kill_at` kill all its processes as soon as that step is logged."""
    settings = {
        "train.steps": STEPS,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.keep_checkpoints": 1,
        "train.log_every": 1,
        "model.depth": 4 if context.on_gpu else 2,
        "data.global_batch": 16 * max(1, context.gpus),
        "engine.micro_batch": 8,
        "engine.precision": "fp32",
        "engine.deterministic": "true",
        "optim.warmup_steps": 0,
    }
    overrides = [*(() if context.on_gpu else REDUCED), *(f"{key}={value}" for key, value in settings.items())]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    program = [*(launcher if ranks > 1 else ["-m"]), "pipeline"]
    command = [sys.executable, *program, "pretrain", "vitb16_mae", "--data", context.data]
    command += ["--run", str(directory), *(f"--set={override}" for override in overrides)]
    output = directory.with_suffix(".output")

    def reached() -> bool:
        return kill_at is not None and any(step >= kill_at for step, _ in _losses(directory))

    reason = run(command, output, device=context.device, timeout_s=TIMEOUT_S, stop_when=reached)
    if reason:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        raise ChildError(f"pretrain: {reason}", "\n".join(lines[-30:]))


def _losses(directory: Path) -> list[tuple[int, float]]:
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last one may be incomplete
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
