"""On a terminal a run shows a progress bar."""

import os
import termios
import threading
from contextlib import suppress
from subprocess import DEVNULL

from forkserver import ForkedProcess
from runs import environment


def test_progress_bar_counts_steps_between_logged_lines(run):
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 200))
    output = []

    def read() -> None:
        with suppress(OSError):  # EIO: all writers have closed it
            while data := os.read(terminal, 4096):
                output.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    arguments = run.arguments(train__steps=3, train__log_every=100)
    process = ForkedProcess(arguments, env=environment(), stdout=DEVNULL, stderr=stderr)
    code = process.wait()
    os.close(stderr)
    reader.join()
    os.close(terminal)
    text = b"".join(output).decode()
    assert code == 0 and " 3/3 [" in text, text[-4000:]
