"""Arguments that several commands have, and their types."""

import argparse
from collections.abc import Callable
from pathlib import Path

LARGEST_SIDE = 4096
"""In pixels: larger images are a slip, which no machine's memory would survive."""


def add_command(
    commands,
    name: str,
    body: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Add a command to argparse's sub-parsers, to be given its arguments. `body` runs it."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=body)
    return command


def training_arguments(command: argparse.ArgumentParser) -> None:
    recipe_arguments(command)
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="shard set, made by data_prep: a directory or a URL; several --data are read as one. "
        "Left out where the recipe has data.sources",
    )
    run_argument(command)
    deepspeed_argument(command)


def recipe_arguments(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """An argument of its own, or, where there is a default, an option."""
    what = "a YAML file, or the name of a recipe that ships"
    if default:
        command.add_argument(
            "--recipe", default=default, metavar="RECIPE", help=f"{what} (default: {default})"
        )
    else:
        command.add_argument("recipe", metavar="RECIPE", help=what)
    override_argument(command)


def override_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a recipe's key",
    )


def run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory: new, or continued"
    )


def deepspeed_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed's JSON in place of one of ds_configs/: ZeRO stage, offload, buckets (docs/engine.md)",
    )


def labelled_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="TRAIN", help="labelled shard set to learn from")
    command.add_argument("--val", required=True, metavar="VAL", help="labelled shard set to be judged on")


def card_arguments(command: argparse.ArgumentParser) -> None:
    """The GPU that an estimate is for."""
    command.add_argument("--gpu", default="h100", metavar="NAME", help="which card (default: h100)")
    command.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="share of its peak (default: 0.4)"
    )


def json_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^63 - 1")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def side(text: str) -> int:
    """Of images, in pixels."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels, from 1 to {LARGEST_SIDE}")
    return int(text)


def fraction(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, over 0 and up to 1")
    return share
