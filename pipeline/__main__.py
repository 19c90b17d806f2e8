"""The command line of `python -m pipeline`.

Heavy libraries are imported when a command runs, so that --help is fast.
"""

import argparse
import sys

from pipeline.commands import estimate, evaluate, export, gpu_check, paper, train, visualize
from pipeline.commands.exit_codes import run_command
from pipeline.distributed.logging import setup_logging

EXAMPLES = """\
examples:
  python -m pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  deepspeed --module pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  python -m pipeline reconstruct runs/l16 --images photos/ --out reconstruction.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    setup_logging()
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> None:
    args = build_parser().parse_args(arguments)
    args.command(args)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; parsed arguments have the function to run as `command`."""
    root = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Pre-train vision transformers by masked image modeling, evaluate and export them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # DeepSpeed's launcher puts this before the command; the environment has the same value.
    root.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (train, evaluate, visualize, export, estimate, paper, gpu_check):
        group.add_to(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
