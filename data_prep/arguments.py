"""Command-line arguments and help of data_prep. Only parses; returns plain values.

Invariant: importing this module and printing help loads nothing but the standard library.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from data_prep.sources.registry import LABEL_OPTIONS, SOURCES, SourceType

_DESCRIPTION = """\
Build a shard set from image archives: checked JPEGs in tar files, shuffled, indexed, with a manifest.

  python -m data_prep folder ~/photographs shards/
  python -m data_prep imagenet ~/ILSVRC2012 shards/ --split train
  python -m data_prep adopt ~/webdataset-tars
  python -m data_prep verify shards/
  python -m data_prep info shards/

Run the same command again to continue an interrupted build. The result is byte-identical for any number of
workers and interruptions.
"""
_EXIT_CODES = """\
exit codes: 0 done; 1 verify found faults; 2 user error (one line on stderr); 75 stopped early, run it again
"""


class _Parser(argparse.ArgumentParser):
    """Report errors in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"data_prep: error: {message}; see `{self.prog} --help`\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `None` stands for sys.argv. Exits with code 2 and one line if it is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m data_prep", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}.\n\nexample:\n  python -m data_prep {example}"
        return commands.add_parser(name, help=help, description=description, epilog=_EXIT_CODES, formatter_class=raw)

    for name, source in SOURCES.items():
        _add_build_arguments(add_command(name, source.help, source.example), source)
    adopt = add_command("adopt", "index WebDataset tars in place, which makes their folder a shard set", "adopt laion/")
    adopt.add_argument("out", metavar="DIR", type=Path, help="folder with the tars, which are only read")
    adopt.add_argument("--split", default="train", type=_split, help="name of the split; default train")
    _add_work_arguments(adopt)
    for flag, keywords in LABEL_OPTIONS.items():
        adopt.add_argument(flag, **keywords)
    finalize = add_command("finalize", "complete a set whose shards were built by array tasks", "finalize shards/")
    verify = add_command("verify", "verify a shard set", "verify shards/ --deep")
    verify.add_argument("--deep", action="store_true", help="also decode every image with DALI, and check label maps")
    info = add_command("info", "show the card of a shard set", "info shards/ --json")
    info.add_argument("--json", action="store_true", help="print the figures as JSON")
    for command in (finalize, verify, info):
        command.add_argument("out", metavar="OUT", type=Path, help="directory of the shard set")
    options = parser.parse_args(arguments)
    index, count = getattr(options, "task_index", None), getattr(options, "num_tasks", None)
    if (index is None) != (count is None):
        parser.error("--task-index and --num-tasks must be given together")
    if index is not None and count is not None and index >= count:
        parser.error(f"--task-index must be below --num-tasks {count}")
    return options


def _add_build_arguments(parser: argparse.ArgumentParser, source: SourceType) -> None:
    add = parser.add_argument
    src_type, what = (
        (str, "folder, tar, brace pattern or URL") if source.accepts_patterns else (Path, "folder or archive")
    )
    add("src", metavar="SRC", type=src_type, help=f"{what} with the images; only read")
    add("out", metavar="OUT", type=Path, help="directory of the shard set; created if missing")
    split = source.splits[0] if source.splits else "train"
    add("--split", default=split, type=_split, choices=source.splits, help=f"default {split}")
    add("--seed", default=0, type=_at_least(0), metavar="N", help="seed of the shuffle; default 0")
    add(
        "--shard-size",
        default="128MB",
        type=_shard_size,
        metavar="SIZE",
        help="size of the source's images per shard (128MB, 1GB), or their number (1000); default 128MB",
    )
    add(
        "--orientation",
        choices=("apply", "ignore"),
        default=source.orientation,
        help=f"turn pixels according to EXIF, or keep them as stored; default {source.orientation}",
    )
    add("--resize", type=_at_least(8), metavar="PX", help="shrink to this shorter side; never enlarge")
    add(
        "--quality",
        type=_quality,
        metavar="Q",
        help="re-encode every image with this JPEG quality; default: only repaired and resized ones, with 95",
    )
    add("--dry-run", action="store_true", help="print the plan; write nothing")
    _add_work_arguments(parser)
    for flag, keywords in source.options.items():
        add(flag, **keywords)


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how images are checked, and by how many processes."""
    add = parser.add_argument
    add("--workers", type=_at_least(1), metavar="N", help="processes; default: one per core")
    add(
        "--check",
        choices=("decode", "structure"),
        default="decode",
        help="decode: decode every image completely (default); structure: only follow a JPEG's markers to its "
        "end, as fast as copying, which misses flipped bits in the image data",
    )
    add(
        "--max-pixels",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="quarantine larger images without decoding them; default 100,000,000",
    )
    add("--task-index", type=_at_least(0), metavar="I", help="do only share I (Slurm array), from 0")
    add("--num-tasks", type=_at_least(1), metavar="N", help="number of shares; `finalize OUT` completes the set")


def _shard_size(text: str) -> tuple[int | None, int | None]:
    """Return (samples, None) or (None, bytes)."""
    match = re.fullmatch(r"([0-9]{1,15})\s*(|[kKMGT]i?B)", text)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images (1000) nor a size (128MB)")
    number, unit = int(match[1]), match[2]
    if not unit:
        return number, None
    return None, number * (1024 if "i" in unit else 1000) ** " KMGT".index(unit[0].upper())


def _split(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits and _ only")
    return text


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return parse_number


def _quality(text: str) -> int:
    value = _at_least(1)(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is above 100")
    return value
