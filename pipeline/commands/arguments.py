"""Arguments and argument types that several commands have in common."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

MAX_IMAGE_SIDE = 4096
"""In pixels. Larger values are mistakes that would exhaust the memory."""


def add_command(
    commands, name: str, body: Callable[[argparse.Namespace], None], summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command, run by `body`, to argparse's subparsers and return its parser."""
    command = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(command=body)
    return command


def add_pretraining_arguments(command: argparse.ArgumentParser) -> None:
    add_recipe_arguments(command)
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="shard set made by data_prep, a directory or a URL; repeat to train on several. Omit it if the "
        "recipe has data.sources",
    )
    add_run_argument(command)
    add_deepspeed_argument(command)


def add_recipe_arguments(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the recipe, positional or, if there is a default, as an option; and --set."""
    text = "a YAML file, or the name of a shipped recipe"
    if default:
        command.add_argument("--recipe", default=default, metavar="RECIPE", help=f"{text}; default: {default}")
    else:
        command.add_argument("recipe", metavar="RECIPE", help=text)
    add_override_argument(command)


def add_override_argument(command: argparse.ArgumentParser) -> None:
    text = "override a recipe key; repeatable"
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_run_argument(command: argparse.ArgumentParser) -> None:
    text = "run directory: new, or a run to resume"
    command.add_argument("--run", type=Path, required=True, metavar="DIR", help=text)


def add_deepspeed_argument(command: argparse.ArgumentParser) -> None:
    text = "DeepSpeed JSON to use instead of one of ds_configs/ (docs/engine.md)"
    command.add_argument("--deepspeed_config", type=Path, metavar="FILE", help=text)


def add_labeled_set_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="TRAIN", help="labeled shard set to train on")
    command.add_argument("--val", required=True, metavar="VAL", help="labeled shard set to evaluate on")


def add_gpu_arguments(command: argparse.ArgumentParser) -> None:
    text = "share of its peak FLOP/s (default: 0.4)"
    command.add_argument("--gpu", default="h100", metavar="NAME", help="GPU model (default: h100)")
    command.add_argument("--mfu", type=float, default=0.4, metavar="F", help=text)


def add_json_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _int_type(low: int, high: float, name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}")
        return int(text)

    return parse


non_negative_int = _int_type(0, 2**63 - 1, "an integer from 0 to 2^63 - 1")
positive_int = _int_type(1, math.inf, "a positive integer")
image_side = _int_type(1, MAX_IMAGE_SIDE, f"a number of pixels, from 1 to {MAX_IMAGE_SIDE}")


def fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value
