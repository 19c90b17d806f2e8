"""Standard output of both command lines.

Invariant: neither a character that the terminal's encoding lacks nor a pipe whose reader has exited ends a command with
a traceback.
"""

import io
import os
import select
import signal
import sys
from collections.abc import Callable

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code, as of other tools before `head`."""


def run_with_output(command: Callable[[], int]) -> int:
    """Run a command line and return its exit code; if the reader of stdout has exited, PIPE_CLOSED without a message.

    Characters that the encoding of stdout lacks are printed as "?".
    """
    if sys.stdout is None:  # started with `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            code = command()
        except SystemExit:  # argparse's, after help or an error
            _flush()
            raise
        _flush()
        return code
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        _discard_output()
        return PIPE_CLOSED


def _flush() -> None:
    """Raise BrokenPipeError if the reader has exited. Commands report other errors."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Let the interpreter's last flush succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _is_stdout_closed() -> bool:
    """Return whether stdout is a pipe whose reader has exited."""
    poller = select.poll()
    poller.register(1, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))
