"""Command line of data_prep: run one command, and turn errors into one line on stderr and an exit code."""

import errno
import json
import logging
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

from data_prep.arguments import parse
from data_prep.errors import StoppedEarly, UserError
from data_prep.optional_packages import missing_package_error
from data_prep.sources.registry import SOURCES
from data_prep.standard_output import run_with_output

_USER_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; `None` stands for sys.argv."""
    return run_with_output(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    options = parse(arguments)
    _setup_logging()
    commands = {"adopt": _adopt, "finalize": _finalize, "verify": _verify, "info": _info}
    try:
        code = commands.get(options.command, _build)(options)
        sys.stdout.flush()  # raises write errors here
        return code
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror}", 2)
    except ImportError as error:
        missing = missing_package_error(error.name or "")
        if missing is None:
            raise
        return _fail(f"error: {missing}", 2)
    except StoppedEarly as error:
        return _fail(str(error), 75)
    except KeyboardInterrupt:
        return _fail("stopped", 75)


def _setup_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("data_prep")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(message: str, code: int) -> int:
    line = f"data_prep: {message}".replace("\n", " ").encode("utf-8", "replace").decode()
    print(line, file=sys.stderr)
    return code


# The commands import what they need when they run: help must not wait for numpy.


def _build(options: Namespace) -> int:
    _check_paths(options)
    from data_prep.builder import Settings, build, plan_build
    from data_prep.images import Policy
    from data_prep.shard_plan import ShardSize

    settings = Settings(
        split=options.split,
        seed=options.seed,
        shard_size=ShardSize(*options.shard_size),
        policy=Policy(options.check, options.orientation, options.resize, options.quality, options.max_pixels),
        workers=_num_workers(options),
        task=_array_task(options),
    )
    source = SOURCES[options.command].open(options.src, options.split, vars(options))
    (plan_build if options.dry_run else build)(source, options.out, settings)
    return 0


def _num_workers(options: Namespace) -> int:
    return options.workers or len(os.sched_getaffinity(0))


def _array_task(options: Namespace):
    from data_prep.builder import ArrayTask

    return None if options.num_tasks is None else ArrayTask(options.task_index, options.num_tasks)


def _check_paths(options: Namespace) -> None:
    path = Path(options.src)
    if not path.exists():
        if SOURCES[options.command].accepts_patterns and re.search(r"://|\{", options.src):
            return
        raise UserError(f"SRC {options.src}: does not exist; check the path")
    source, out = path.resolve(), options.out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"OUT {options.out}: is inside SRC {options.src}, so shards would become inputs")


def _adopt(options: Namespace) -> int:
    from data_prep.adopt import adopt
    from data_prep.images import Policy

    policy = Policy(options.check, "ignore", max_pixels=options.max_pixels)
    labels = (options.labels, options.label_key)
    adopt(options.out, options.split, policy, *labels, _num_workers(options), _array_task(options))
    return 0


def _finalize(options: Namespace) -> int:
    from data_prep.adopt import finalize_adoption, is_adoption
    from data_prep.builder import print_summary
    from data_prep.finalize import finalize

    if is_adoption(options.out):
        finalize_adoption(options.out)
        return 0
    manifest = finalize(options.out)
    if manifest is None:
        print(f"{options.out} is already complete")
    else:
        print_summary(options.out, manifest)
    return 0


def _verify(options: Namespace) -> int:
    from data_prep.shard_set import read_manifest
    from data_prep.verify import find_faults

    num_faults = 0
    for fault in find_faults(options.out, options.deep):
        num_faults += 1
        print(fault)
    if num_faults:
        return 1
    manifest = read_manifest(options.out)
    print(f"{options.out}: complete; {manifest.num_samples:,} samples in {len(manifest.shards):,} shards")
    return 0


def _info(options: Namespace) -> int:
    from data_prep.shard_set import CARD, CARD_JSON, CONTACT_SHEET, ShardSetError, read_manifest

    read_manifest(options.out)
    path = options.out / (CARD_JSON if options.json else CARD)
    try:
        text = path.read_text(encoding="utf-8")
        if options.json:
            json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise ShardSetError(f"{path}: cannot be read ({reason}); restore it or build the set again") from error
    print(text, end="")
    if not options.json:
        print(f"\nContact sheet: {options.out / CONTACT_SHEET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
