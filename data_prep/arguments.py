"""The commands' arguments and help. It only parses: what is returned is plain values.

Invariant: importing it and printing help loads nothing but the standard library.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

_DESCRIPTION = """\
Turns image archives into a shard set: checked JPEGs in tar files, shuffled, indexed, with a manifest.

  python -m data_prep folder ~/photographs shards/
  python -m data_prep imagenet ~/ILSVRC2012 shards/ --split train
  python -m data_prep verify shards/
  python -m data_prep info shards/

The same command continues a build that was interrupted. The result is the same to the byte,
whatever the number of workers and of interruptions.
"""
_EXIT_CODES = """\
exit codes: 0 done; 1 verify found faults; 2 something for you to mend; 75 stopped early, run it again
"""
_FORMATTER = argparse.RawDescriptionHelpFormatter

_SOURCES = {
    "folder": (
        "build a shard set from any folder or archive of images; class sub-folders become labels",
        "python -m data_prep folder ~/photographs shards/ --resize 256 --workers 8",
    ),
    "imagenet": (
        "build ImageNet-1k from the official archives, class folders or Kaggle's tree",
        "python -m data_prep imagenet ~/ILSVRC2012 shards/ --split train",
    ),
    "imagenet21k": (
        "build ImageNet-21k from a tar per synset",
        "python -m data_prep imagenet21k ~/winter21 shards/ --check structure --workers 16",
    ),
    "openimages": (
        "build OpenImages from folders or archives, with labels, boxes and attribution",
        "python -m data_prep openimages ~/openimages shards/ --split train --resize 512",
    ),
    "coco": (
        "build COCO from its zips or folders, with instances and captions",
        "python -m data_prep coco ~/coco shards/ --split train",
    ),
}
_SPLITS = {
    "folder": ("train", None),
    "imagenet": ("train", ("train", "val")),
    "imagenet21k": ("train", None),
    "openimages": ("train", ("train", "validation", "test")),
    "coco": ("train", None),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help says the rest."""

    def error(self, message: str):
        self.exit(2, f"data_prep: error: {message}; `{self.prog} --help` says what there is\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Ends the process with exit code 2 and one line when the arguments are wrong."""
    parser = _Parser(
        prog="python -m data_prep", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=_FORMATTER
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (what, example) in _SOURCES.items():
        _add_build_arguments(_add(commands, name, what, example), name)
    example = "python -m data_prep finalize shards/"
    finalize = _add(
        commands, "finalize", "make a set whole that array tasks (--task-index) have built", example
    )
    verify = _add(
        commands, "verify", "prove that a shard set is whole", "python -m data_prep verify shards/ --deep"
    )
    verify.add_argument("--deep", action="store_true", help="decode every image with DALI, too")
    info = _add(commands, "info", "show what is in a shard set", "python -m data_prep info shards/ --json")
    info.add_argument("--json", action="store_true", help="the figures as JSON")
    for parser_of_set in (finalize, verify, info):
        parser_of_set.add_argument("out", metavar="OUT", type=Path, help="the shard set's directory")
    options = parser.parse_args(arguments)
    if (getattr(options, "task_index", None) is None) != (getattr(options, "num_tasks", None) is None):
        parser.error("--task-index and --num-tasks go together")
    if getattr(options, "num_tasks", None) is not None and options.task_index >= options.num_tasks:
        parser.error(f"--task-index must be below --num-tasks {options.num_tasks}")
    return options


def _add(commands, name: str, what: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.\n\nexample:\n  {example}",
        epilog=_EXIT_CODES,
        formatter_class=_FORMATTER,
    )


def _add_build_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="where the images are; only read")
    add("out", metavar="OUT", type=Path, help="directory of the shard set; made if missing")
    split, choices = _SPLITS[source]
    add("--split", default=split, type=_split, choices=choices, help=f"default {split}")
    add("--seed", default=0, type=_at_least(0), metavar="N", help="of the shuffle; default 0")
    add("--workers", type=_at_least(1), metavar="N", help="processes; default: one per core")
    add(
        "--shard-size",
        default="128MB",
        type=shard_size,
        metavar="SIZE",
        help="of the source's images per shard (128MB, 1GB), or their number (1000); default 128MB",
    )
    add(
        "--check",
        choices=("decode", "structure"),
        default="decode",
        help="decode every image whole (default), or follow a JPEG's markers to its end: as fast as copying, "
        "but a flipped bit inside the image data goes unnoticed",
    )
    orientation = "apply" if source == "folder" else "ignore"
    add(
        "--orientation",
        choices=("apply", "ignore"),
        default=orientation,
        help=f"turn pixels as EXIF says, or leave them as stored; default {orientation}",
    )
    add("--resize", type=_at_least(8), metavar="PX", help="shrink to this shorter side; never enlarges")
    add(
        "--quality",
        type=_quality,
        metavar="Q",
        help="re-encode every image with this JPEG quality; otherwise only repaired and resized ones (95)",
    )
    add(
        "--max-pixels",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="images with more go to quarantine undecoded; default 100,000,000",
    )
    add("--dry-run", action="store_true", help="plan and say what would be built; write nothing")
    add(
        "--task-index",
        type=_at_least(0),
        metavar="I",
        help="build only the I-th share (a Slurm array), from 0",
    )
    add("--num-tasks", type=_at_least(1), metavar="N", help="of N shares; then `finalize OUT`")
    if source == "folder":
        add(
            "--labels",
            choices=("auto", "folders", "none"),
            default="auto",
            help="folders: the first folder of a path is the class; none: no labels; auto: labels when there "
            "are sub-folders and no image lies beside them (default)",
        )
    if source == "imagenet":
        add(
            "--layout",
            choices=("archives", "folders", "kaggle"),
            help="default: recognised, and named in the log",
        )


def shard_size(text: str) -> tuple[int | None, int | None]:
    """(samples, None) or (None, bytes)."""
    match = re.fullmatch(r"([0-9]{1,15})\s*(|[kKMGT]i?B)", text)
    number = int(match[1]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images (1000) nor a size (128MB)")
    if not match[2]:
        return number, None
    base = 1024 if "i" in match[2] else 1000
    return None, number * base ** " KMGT".index(match[2][0].upper())


def _split(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits and _ only")
    return text


def _at_least(lowest: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} up")
        return int(text)

    return parse_number


def _quality(text: str) -> int:
    value = _at_least(1)(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is above 100")
    return value
