"""Conversion of exceptions to a line on stderr and an exit code.

Invariant: an error of the user is one line without a traceback. Errors that all ranks raise are printed by
rank 0.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.standard_output import run_with_output
from pipeline.distributed.logging import env_rank
from pipeline.errors import AllRanksError, Diverged, StoppedEarly, UserError, missing_package_error

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {
    **dict.fromkeys(DISK_FULL, "free some space, and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "fix the permissions, or choose a writable location"),
}
CACHES = ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
"""Environment variables that move the caches of the libraries out of the home directory."""


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit code, as listed by `pretrain --help`."""
    return run_with_output(lambda: _exit_code(command))


def _exit_code(command: Callable[[], None]) -> int:
    try:
        command()
        sys.stdout.flush()  # raises write errors here
    except UserError as error:
        _print(f"error: {error}", rank_0_only=isinstance(error, AllRanksError))
        return 2
    except StoppedEarly as stop:
        _print(str(stop), rank_0_only=True)
        return 75
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print(f"error: {where}{error.strerror}; {_remedy(error.errno, error.filename)}")
        return 2
    except ImportError as error:
        missing = missing_package_error(error.name or "")
        if missing is None:
            raise
        _print(f"error: {missing}")
        return 2
    except Diverged as error:
        _print(f"stopped: {error}", rank_0_only=True)
        return 4
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        what = str(error).partition(". ")[0]
        _print(f"error: {what}; end other programs on this GPU, or use a smaller model or image size")
        return 2
    except KeyboardInterrupt:
        _print("interrupted; the same command resumes from the last checkpoint")
        return 130
    return 0


def _remedy(number: int, path: object) -> str:
    below_home = os.path.relpath(str(path), Path.home())
    if path and below_home.startswith(".") and not below_home.startswith("..") and number not in DISK_FULL:
        return f"set HOME, or {', '.join(CACHES)}, to a writable directory"
    return REMEDIES[number]


def _print(text: str, rank_0_only: bool = False) -> None:
    if not (rank_0_only and env_rank()):
        print(f"pipeline: {text}", file=sys.stderr, flush=True)
