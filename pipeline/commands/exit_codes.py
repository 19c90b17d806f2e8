"""Conversion of exceptions to a line on stderr and an exit code.

Invariant: an error of the user is one line without a traceback. Errors that all ranks raise are printed by
rank 0.
"""

import errno
import os
import select
import signal
import sys
from collections.abc import Callable

from pipeline.distributed.logging import env_rank
from pipeline.errors import AllRanksError, Diverged, StoppedEarly, UserError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "fix the permissions, or choose a writable location"),
}


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit code, as listed by `pretrain --help`."""
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
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's last flush
            return 128 + signal.SIGPIPE  # as other tools before `head`
        if error.errno not in REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print(f"error: {where}{error.strerror}; {REMEDIES[error.errno]}")
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


def _print(text: str, rank_0_only: bool = False) -> None:
    if not (rank_0_only and env_rank()):
        print(f"pipeline: {text}", file=sys.stderr, flush=True)


def _stdout_is_closed() -> bool:
    """Return whether stdout is a pipe whose reader has exited."""
    poller = select.poll()
    poller.register(1, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))
