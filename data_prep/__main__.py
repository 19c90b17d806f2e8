"""The command line. It parses arguments, calls one function and turns errors into one line and an exit
code."""

import argparse
import re
import sys
from pathlib import Path

from data_prep.errors import BuildStopped, UserError
from data_prep.shard_set import CARD, CONTACT_SHEET, ShardSetError, read_manifest

_DESCRIPTION = """\
Turns image archives into a shard set: checked JPEGs in tar files, shuffled, indexed, with a manifest.

  python -m data_prep folder ~/photographs shards/
  python -m data_prep verify shards/
  python -m data_prep info shards/

The same command continues a build that was interrupted. The result is the same to the byte,
whatever the number of workers and of interruptions.
"""
_EXIT_CODES = """\
exit codes: 0 done; 1 verify found faults; 2 something for you to mend; 75 stopped early, run it again
"""
_FORMATTER = argparse.RawDescriptionHelpFormatter


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (UserError, ShardSetError) as error:
        return _fail(error, 2)
    except BuildStopped as error:
        return _fail(error, 75)
    except KeyboardInterrupt:
        return _fail("stopped", 75)


def _fail(error: object, code: int) -> int:
    print(f"data_prep: {error}".replace("\n", " "), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=_FORMATTER
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_folder(commands)
    verify = _add(
        commands, "verify", "prove that a shard set is whole", "python -m data_prep verify shards/", _verify
    )
    verify.add_argument("out", metavar="OUT", type=Path, help="the shard set's directory")
    info = _add(commands, "info", "show what is in a shard set", "python -m data_prep info shards/", _info)
    info.add_argument("out", metavar="OUT", type=Path, help="the shard set's directory")
    return parser


def _add(commands, name: str, what: str, example: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.\n\nexample:\n  {example}",
        epilog=_EXIT_CODES,
        formatter_class=_FORMATTER,
    )
    parser.set_defaults(run=run)
    return parser


def _add_folder(commands) -> None:
    parser = _add(
        commands,
        "folder",
        "build a shard set from any folder of images; class sub-folders become labels",
        "python -m data_prep folder ~/photographs shards/ --resize 256 --workers 8",
        _build_folder,
    )
    _add_build_arguments(parser, default_split="train", orientation="apply")
    parser.add_argument(
        "--labels",
        choices=("auto", "folders", "none"),
        default="auto",
        help="folders: the first folder of a path is the class; none: no labels; auto: labels when there are "
        "sub-folders and no image lies beside them (default)",
    )


def _add_build_arguments(parser: argparse.ArgumentParser, default_split: str, orientation: str) -> None:
    parser.add_argument("src", metavar="SRC", type=Path, help="where the images are; only read")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the shard set; made if missing")
    parser.add_argument("--split", default=default_split, type=_split, help=f"default {default_split}")
    parser.add_argument("--seed", default=0, type=_at_least(0), help="of the shuffle; default 0")
    parser.add_argument("--workers", default=None, type=_at_least(1), help="processes; default: one per core")
    parser.add_argument(
        "--shard-size",
        default="128MB",
        type=_shard_size,
        metavar="SIZE",
        help="of the source's images per shard (128MB, 1GB), or their number (1000); default 128MB",
    )
    parser.add_argument(
        "--check",
        choices=("decode", "structure"),
        default="decode",
        help="decode every image whole (default), or follow a JPEG's markers to its end: as fast as copying, "
        "but a flipped bit inside the image data goes unnoticed",
    )
    parser.add_argument(
        "--orientation",
        choices=("apply", "ignore"),
        default=orientation,
        help=f"turn pixels as EXIF says, or leave them as stored; default {orientation}",
    )
    parser.add_argument(
        "--resize", type=_at_least(8), metavar="PX", help="shrink to this shorter side; never enlarges"
    )
    parser.add_argument(
        "--quality",
        type=_quality,
        metavar="Q",
        help="re-encode every image with this JPEG quality; otherwise only repaired and resized ones (95)",
    )
    parser.add_argument(
        "--max-pixels",
        type=_at_least(1),
        default=100_000_000,
        metavar="N",
        help="images with more go to quarantine undecoded; default 100,000,000",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="plan and say what would be built; write nothing"
    )


def _build_folder(options) -> int:
    _check_src(options)
    from data_prep.sources.folder import FolderSource

    return _build(options, FolderSource(options.src, options.labels))


def _check_src(options) -> None:
    if not options.src.exists():
        raise UserError(f"SRC {options.src} does not exist")
    source, out = options.src.resolve(), options.out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"OUT {options.out} lies in SRC {options.src}: the shards would become inputs")


def _build(options, source) -> int:
    import os

    from data_prep.builder import Settings, build, prepare
    from data_prep.images import Policy

    policy = Policy(options.check, options.orientation, options.resize, options.quality, options.max_pixels)
    workers = options.workers or len(os.sched_getaffinity(0))
    settings = Settings(options.split, options.seed, options.shard_size, policy, workers)
    if options.dry_run:
        prepare(source, options.out, settings)
    else:
        build(source, options.out, settings)
    return 0


def _verify(options) -> int:
    from data_prep.verify import faults

    found = 0
    for fault in faults(options.out):
        found += 1
        print(fault)
    if found:
        return 1
    manifest = read_manifest(options.out)
    print(f"{options.out}: whole; {manifest.num_samples:,} samples in {len(manifest.shards):,} shards")
    return 0


def _info(options) -> int:
    read_manifest(options.out)
    try:
        print((options.out / CARD).read_text(encoding="utf-8"), end="")
    except OSError as error:
        raise ShardSetError(f"{options.out / CARD} can't be read: {error.strerror}") from None
    print(f"\nContact sheet: {options.out / CONTACT_SHEET}")
    return 0


def _shard_size(text: str):
    from data_prep.plan import ShardSize

    match = re.fullmatch(r"([0-9]+)\s*(|[kKMGT]i?B)", text)
    number = int(match[1]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images (1000) nor a size (128MB)")
    if not match[2]:
        return ShardSize(samples=number)
    base = 1024 if "i" in match[2] else 1000
    return ShardSize(bytes=number * base ** (" KMGT".index(match[2][0].upper())))


def _split(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits and _ only")
    return text


def _at_least(lowest: int):
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} up")
        return int(text)

    return parse


def _quality(text: str) -> int:
    value = _at_least(1)(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is above 100")
    return value


if __name__ == "__main__":
    sys.exit(main())
