"""Waiting for storage that is slow or fails: a bounded time, a few more tries, then one clear line.

Invariant: `patiently` returns or raises within `Patience.bound` seconds after the storage's last sign of
life. A try that hangs (a stalled connection, a dead NFS server) is left behind in a thread of its own, since
nothing can end it.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageTimeout, UserError
from pipeline.recipe.sections import RetryPolicy

T = TypeVar("T")

QUIET = 5.0  # seconds between two lines on stderr
STOP_POLL = 0.2  # seconds


class Cancelled(Exception):
    """Nobody wants the result any more."""


def retry_with_timeout(
    attempt: Callable[[Callable[[], None]], T],
    where: str,
    policy: RetryPolicy,
    stop: threading.Event,
    warn: Callable[[str], None],
) -> T:
    """`attempt(alive)`, tried again after every OSError and after `timeout_s` without a call of `alive()`.

    `where` names the file in messages, and `warn` takes one for every try that failed. FileNotFoundError and
    PermissionError are final. Raises Unanswered in the end, Stopped soon after `stop` is set.
    """
    for number, wait in enumerate([*policy.delays_s, None]):
        try:
            return _Attempt(attempt).result(policy.timeout_s, stop)
        except FileNotFoundError:
            raise UserError(f"{where}: is missing; restore it, or build the shard set anew") from None
        except PermissionError as error:
            raise UserError(f"{where}: must not be read: {error.strerror or error}; ask for access") from None
        except OSError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if wait is None:
                raise StorageTimeout(
                    f"{where}: cannot be read (tries: {number + 1}): {reason}; when the storage answers "
                    "again, the same command continues"
                ) from None
            warn(f"{where}: {reason}; try {number + 2} of {policy.retries + 1} in {wait:g} s")
            if stop.wait(wait):
                raise Cancelled from None
    raise AssertionError("unreachable")


class _Attempt(threading.Thread):
    def __init__(self, attempt: Callable[[Callable[[], None]], T]):
        super().__init__(daemon=True)
        self._attempt = attempt
        self._seen = time.monotonic()
        self._finished = threading.Event()
        self._outcome: tuple[T | None, BaseException | None] = (None, None)
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._attempt(self._heartbeat), None
        except BaseException as error:
            self._outcome = None, error
        self._finished.set()

    def _heartbeat(self) -> None:
        self._seen = time.monotonic()

    def result(self, timeout_s: float, stop: threading.Event) -> T:
        while not self._finished.wait(min(STOP_POLL, timeout_s)):
            if stop.is_set():
                raise Cancelled
            if time.monotonic() - self._seen > timeout_s:
                raise TimeoutError(f"no answer for {timeout_s:g} s")
        value, error = self._outcome
        if error is not None:
            raise error
        return value


class RateLimitedWarnings:
    """Lines on stderr, at most one every `QUIET` seconds; the next says how many were not shown."""

    def __init__(self):
        self._lock = threading.Lock()
        self._last: float | None = None
        self._swallowed = 0

    def __call__(self, line: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._last is not None and now - self._last < QUIET:
                self._swallowed += 1
                return
            more = f" (and {self._swallowed} like it since the last line)" if self._swallowed else ""
            self._last, self._swallowed = now, 0
        print(f"warning: {line}{more}", file=sys.stderr, flush=True)
