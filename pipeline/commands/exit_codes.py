"""How a command ends: what it raises for the user becomes one line on stderr and an exit code."""

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from pipeline.errors import AllRanksError, Diverged, StoppedEarly, UserError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and start the same command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "ask for access, or name a place where you may write"
    ),
}


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a command; what it raises for the user becomes a line on stderr and an exit code."""
    try:
        command()
        print(end="", flush=True)  # what cannot be written is found here
    except AllRanksError as error:
        if not rank():
            print(f"pipeline: error: {error}", file=sys.stderr, flush=True)
        return 2
    except UserError as error:
        _let_rank_0_speak()
        print(f"pipeline: error: {error}", file=sys.stderr, flush=True)
        return 2
    except StoppedEarly as stop:
        if not rank():
            print(f"pipeline: {stop}", file=sys.stderr, flush=True)
        return 75
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the interpreter may flush what is left
            return 128 + signal.SIGPIPE  # as of any other tool before `head`
        if error.errno not in REMEDIES:
            raise
        _let_rank_0_speak()
        where = f"{error.filename}: " if error.filename else ""
        print(f"pipeline: error: {where}{error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
        return 2
    except Diverged as error:
        if not rank():
            print(f"pipeline: stopped: {error}", file=sys.stderr, flush=True)
        return 4
    except KeyboardInterrupt:
        print("pipeline: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _let_rank_0_speak() -> None:
    # All ranks usually find the same fault: rank 0 says it, and the launcher ends the others while they wait.
    if rank():
        time.sleep(10)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def rank() -> int:
    """This process's, as its launcher says it; no engine and no torch is needed."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0
