"""The command gpu-check."""

import argparse
import sys
from pathlib import Path

from pipeline.commands.arguments import add_command, positive_int
from pipeline.gpu_check.registry import CHECKS

DESCRIPTION = """\
Verify on this machine what was only verified on a CPU: decoding, numerics, ZeRO stages, resume, compile, speed,
memory, checkpoints and network. Each check runs in a process of its own, so a crash or a hang is a failed check. Ends
with recommended settings for the machine, derived from what was measured.
"""
EXAMPLES = """\
examples:
  python -m pipeline gpu-check
  python -m pipeline gpu-check --data shards/imagenet-train --gpus 8 --json gpu-check.json
  python -m pipeline gpu-check --only pixels memory
  python -m pipeline gpu-check --device cpu

exit codes:
  0   no check failed
  1   a check failed
  2   there is no GPU, or another user error (one-line message)
"""


def add_to(commands) -> None:
    summary = "verify the GPU path on this machine"
    command = add_command(commands, "gpu-check", _gpu_check, summary, DESCRIPTION, EXAMPLES)
    add = command.add_argument
    add("--data", metavar="DIR", help="shard set to measure with (default: synthetic images)")
    add("--gpus", type=positive_int, metavar="N", help="GPUs for the checks with several (default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: test the checks themselves, at reduced size")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")
    add(
        "--only",
        nargs="+",
        default=[],
        choices=[check.name for check in CHECKS],
        metavar="CHECK",
        help="run only these checks",
    )


def _gpu_check(args: argparse.Namespace) -> None:
    from pipeline.gpu_check.command import gpu_check

    checks = [check for check in CHECKS if not args.only or check.name in args.only]
    if not gpu_check(args.device, args.data, args.gpus, args.json, checks):
        sys.exit(1)
