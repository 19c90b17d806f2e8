"""The command line: calls one function for each command and turns errors into one line and an exit code."""

import json
import os
import sys

from data_prep.arguments import parse
from data_prep.errors import StoppedEarly, UserError


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return _fail("stopped", 75)


def _run(options) -> int:
    # What a command needs is imported when it runs: help must not wait for numpy.
    from data_prep.shard_set import ShardSetError

    commands = {"finalize": _finalize, "verify": _verify, "info": _info}
    try:
        return commands.get(options.command, _build)(options)
    except (UserError, ShardSetError) as error:
        return _fail(error, 2)
    except PermissionError as error:
        return _fail(f"{error.filename}: {error.strerror}", 2)
    except StoppedEarly as error:
        return _fail(error, 75)


def _fail(error: object, code: int) -> int:
    print(f"data_prep: {error}".replace("\n", " ").encode("utf-8", "replace").decode(), file=sys.stderr)
    return code


def _build(options) -> int:
    _check_src(options)
    from data_prep.builder import Settings, Task, build, prepare
    from data_prep.images import Policy
    from data_prep.shard_plan import ShardSize

    settings = Settings(
        split=options.split,
        seed=options.seed,
        shard_size=ShardSize(*options.shard_size),
        policy=Policy(
            options.check, options.orientation, options.resize, options.quality, options.max_pixels
        ),
        workers=options.workers or len(os.sched_getaffinity(0)),
        task=None if options.num_tasks is None else Task(options.task_index, options.num_tasks),
    )
    source = _source(options)
    if options.dry_run:
        prepare(source, options.out, settings)
    else:
        build(source, options.out, settings)
    return 0


def _check_src(options) -> None:
    if not options.src.exists():
        raise UserError(f"SRC {options.src} does not exist")
    source, out = options.src.resolve(), options.out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"OUT {options.out} lies in SRC {options.src}: the shards would become inputs")


def _source(options):
    match options.command:
        case "folder" if options.src.is_file():
            from data_prep.sources.image_archive import ArchiveSource

            return ArchiveSource(options.src, options.labels)
        case "folder":
            from data_prep.sources.folder import FolderSource

            return FolderSource(options.src, options.labels)
        case "imagenet":
            from data_prep.sources.imagenet import ImageNetSource

            return ImageNetSource(options.src, options.split, options.layout)
        case "imagenet21k":
            from data_prep.sources.imagenet21k import ImageNet21kSource

            return ImageNet21kSource(options.src)
        case "openimages":
            from data_prep.sources.openimages import OpenImagesSource

            return OpenImagesSource(options.src, options.split)
        case "coco":
            from data_prep.sources.coco import CocoSource

            return CocoSource(options.src, options.split)


def _finalize(options) -> int:
    from data_prep.builder import describe
    from data_prep.finalize import finalize

    manifest = finalize(options.out)
    print(f"{options.out} is whole already" if manifest is None else describe(options.out, manifest))
    return 0


def _verify(options) -> int:
    from data_prep.shard_set import read_manifest
    from data_prep.verify import find_faults

    found = 0
    for fault in find_faults(options.out, options.deep):
        found += 1
        print(fault)
    if found:
        return 1
    manifest = read_manifest(options.out)
    print(f"{options.out}: whole; {manifest.num_samples:,} samples in {len(manifest.shards):,} shards")
    return 0


def _info(options) -> int:
    from data_prep.shard_set import CARD, CARD_JSON, CONTACT_SHEET, ShardSetError, read_manifest

    read_manifest(options.out)
    path = options.out / (CARD_JSON if options.json else CARD)
    try:
        text = path.read_text(encoding="utf-8")
        if options.json:
            json.loads(text)
    except FileNotFoundError:
        raise ShardSetError(f"{path} is missing: restore it, or build the set again") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is damaged"
        raise ShardSetError(f"{path} can't be read ({why}): restore it, or build the set again") from None
    print(text, end="")
    if not options.json:
        print(f"\nContact sheet: {options.out / CONTACT_SHEET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
