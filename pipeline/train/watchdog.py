"""Watchdog: a rank that makes no progress writes its stack traces and exits.

Invariant: a run makes progress, or every rank that still runs code exits within `timeout_s` seconds with exit code 3.
The stacks of all its threads are then in stacks/rank-R.txt; later starts keep that file under another name.

A thread checks the time of the last heartbeat. If a C call holds the interpreter lock, so that no Python thread
runs, faulthandler's own timer does the same a little later, with exit code 1.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.distributed.logging import ALL_RANKS
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)
EXIT_CODE = 3
FAULTHANDLER_FACTOR = 1.25
"""Timeout of faulthandler's timer, as a multiple of the thread's."""
EXTENDED_FACTOR = 6
"""Factor of the timeout for start, checkpoint, rollback and end, whose duration depends on the storage."""


class Watchdog:
    """Ends this process if `heartbeat` is not called for `timeout_s` seconds."""

    def __init__(self, run: RunDirectory, rank: int, timeout_s: float):
        self.timeout_s = timeout_s
        self._path = run.stacks / f"rank-{rank}.txt"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_earlier_stacks()
        self._file = open(self._path, "w")  # noqa: SIM115 (closed in `close`)
        self._last_heartbeat = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def heartbeat(self) -> None:
        """Report progress."""
        self._last_heartbeat = time.monotonic()

    @contextmanager
    def extended_timeout(self) -> Iterator[None]:
        """Multiply the timeout by `EXTENDED_FACTOR` inside the block."""
        self.heartbeat()
        self.timeout_s *= EXTENDED_FACTOR
        try:
            yield
        finally:
            self.heartbeat()
            self.timeout_s /= EXTENDED_FACTOR

    def close(self) -> None:
        self._closed.set()
        self._thread.join()  # it may be about to set faulthandler's timer
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _keep_earlier_stacks(self) -> None:
        """Rename the stacks of an earlier start by their time: rank-0.20260131-235959.txt."""
        if self._path.exists() and (stat := self._path.stat()).st_size:
            when = time.strftime("%Y%m%d-%H%M%S", time.localtime(stat.st_mtime))
            self._path.rename(self._path.with_suffix(f".{when}.txt"))

    def _watch(self) -> None:
        while not self._closed.is_set():
            remaining = self._last_heartbeat + self.timeout_s - time.monotonic()
            if remaining <= 0:
                break
            later = remaining + self.timeout_s * (FAULTHANDLER_FACTOR - 1)
            faulthandler.dump_traceback_later(later, exit=True, file=self._file)
            self._closed.wait(min(remaining, self.timeout_s / 8))
        if self._closed.is_set():
            faulthandler.cancel_dump_traceback_later()
            return
        faulthandler.dump_traceback(self._file, all_threads=True)
        os.fsync(self._file.fileno())
        logger.error(
            f"no progress for {self.timeout_s:.0f} s (engine.timeout_minutes): a rank hangs; the stacks of this one "
            f"are in {self._path}; the same command resumes",
            extra=ALL_RANKS,
        )
        os._exit(EXIT_CODE)
