"""The command line of `python -m pipeline`.

Heavy imports wait until a command runs, so that --help answers at once.
"""

import argparse
import sys

from pipeline.commands import estimate, evaluate, train, visualize
from pipeline.commands.exit_codes import exit_code_of
from pipeline.distributed.logging import setup_logging

EXAMPLES = """\
examples:
  python -m pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  deepspeed --module pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  python -m pipeline reconstruct runs/l16 --images photos/ --out reconstruction.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parser().parse_args(arguments)
    setup_logging()
    return exit_code_of(lambda: args.command(args))


def parser() -> argparse.ArgumentParser:
    """Of all commands; a parsed command line holds its body as `command`."""
    root = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Pre-train vision transformers by masked image modelling, and look at what they learned.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # DeepSpeed's launcher puts this before the command; the environment says the same.
    root.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (train, evaluate, visualize, estimate):
        group.add_to(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
