"""A rank that waits for ever ends itself, and leaves word where it waited.

Invariant: a run makes progress, or every rank of it that can run ends within `patience` seconds, with exit
code 3 and the stacks of all its threads in stacks/rank-R.txt, which later starts keep. Where it is `patient`,
as while a checkpoint is written, `SLOW` times as much.

It is a thread that looks at a clock. Where a call holds the interpreter so that no thread can run,
faulthandler's own timer, which needs no interpreter, does the same a little later, with exit code 1.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 3
FAULTHANDLER_FACTOR = 1.25
"""faulthandler's timer runs so much longer than the thread's patience."""
EXTENDED_FACTOR = 6
"""Times the patience that a start, a checkpoint, a return or the end may take: its time is the storage's."""


class Watchdog:
    """Ends this process where `alive` is not called for `patience` seconds."""

    def __init__(self, run: Path, rank: int, timeout_s: float):
        self.timeout_s = timeout_s
        self.path = run / "stacks" / f"rank-{rank}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_stacks()
        self.file = open(self.path, "w")  # noqa: SIM115 (open as long as the process may hang)
        self.seen = time.monotonic()
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def heartbeat(self) -> None:
        """Something was done."""
        self.seen = time.monotonic()

    @contextmanager
    def extended_timeout(self) -> Iterator[None]:
        """Inside, `SLOW` times as much may pass."""
        self.heartbeat()
        self.timeout_s *= EXTENDED_FACTOR
        try:
            yield
        finally:
            self.heartbeat()
            self.timeout_s /= EXTENDED_FACTOR

    def close(self) -> None:
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _keep_stacks(self) -> None:
        """Those of an earlier start get its time: rank-0.20260131-235959.txt."""
        if self.path.exists() and (found := self.path.stat()).st_size:
            when = time.strftime("%Y%m%d-%H%M%S", time.localtime(found.st_mtime))
            self.path.rename(self.path.with_suffix(f".{when}.txt"))

    def _watch(self) -> None:
        while not self.closed.is_set():
            left = self.seen + self.timeout_s - time.monotonic()
            if left <= 0:
                break
            faulthandler.dump_traceback_later(
                left + self.timeout_s * (FAULTHANDLER_FACTOR - 1), exit=True, file=self.file
            )
            self.closed.wait(min(left, self.timeout_s / 8))
        if self.closed.is_set():
            faulthandler.cancel_dump_traceback_later()
            return
        faulthandler.dump_traceback(self.file, all_threads=True)
        os.fsync(self.file.fileno())
        print(
            f"pipeline: nothing has happened for {self.timeout_s:.0f} s (engine.timeout_minutes): some rank "
            f"hangs. Where this one waited is in {self.path}; the same command continues",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)
