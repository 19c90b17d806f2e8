"""A launcher that starts a program by the fork server: `python forked.py MODULE ...`."""

import signal
import sys

from forkserver import ForkedProcess

process = ForkedProcess(["-m", *sys.argv[1:]])
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: process.send_signal(number))
code = process.wait()
sys.exit(code if code >= 0 else 128 - code)
