"""Read from slow or failing storage with timeouts, retries and backoff.

Invariant: `retry_with_timeout` returns or raises within `RetryPolicy.max_total_s` seconds of the storage's
last heartbeat. A hanging attempt (a stalled connection, a dead NFS server) cannot be interrupted, so each
attempt has its own daemon thread, which is abandoned on a timeout.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pipeline.distributed.logging import ALL_RANKS
from pipeline.errors import StorageTimeout, UserError
from pipeline.recipe.sections import RetryPolicy

logger = logging.getLogger(__name__)
T = TypeVar("T")
Heartbeat = Callable[[], None]
"""Called by a reader at every sign of progress."""

WARNING_INTERVAL_S = 5.0
STOP_POLL_S = 0.2


class Cancelled(Exception):
    """Raised by a read after its reader was closed."""


def retry_with_timeout(
    attempt: Callable[[Heartbeat], T],
    path: str,
    policy: RetryPolicy,
    stop: threading.Event,
    warn: Callable[[str], None],
) -> T:
    """Return `attempt(heartbeat)`, retried after each OSError and each `timeout_s` without a heartbeat.

    Args:
        path: the file or URL, for messages.
        warn: called with a message for each failed attempt that is retried.

    Raises:
        UserError: If the file is missing or may not be read; neither is retried.
        StorageTimeout: If the last retry fails.
        Cancelled: Soon after `stop` is set.
    """
    for number, delay in enumerate([*policy.delays_s, None]):
        try:
            return _run_with_timeout(attempt, policy.timeout_s, stop)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; restore it, or rebuild the shard set") from None
        except PermissionError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: permission denied ({reason}); ask for read access") from error
        except OSError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if delay is None:
                raise StorageTimeout(
                    f"{path}: cannot be read (tries: {number + 1}): {reason}; run the same command again "
                    "once the storage responds"
                ) from error
            warn(f"{path}: {reason}; try {number + 2} of {policy.retries + 1} in {delay:g} s")
            if stop.wait(delay):
                raise Cancelled from None
    raise AssertionError("unreachable")


def _run_with_timeout(attempt: Callable[[Heartbeat], T], timeout_s: float, stop: threading.Event) -> T:
    future: Future[T] = Future()
    last_heartbeat = time.monotonic()

    def heartbeat() -> None:
        nonlocal last_heartbeat
        last_heartbeat = time.monotonic()

    def run() -> None:
        try:
            future.set_result(attempt(heartbeat))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], min(STOP_POLL_S, timeout_s)).done:
        if stop.is_set():
            raise Cancelled
        if time.monotonic() - last_heartbeat > timeout_s:
            raise TimeoutError(f"no data received for {timeout_s:g} s")
    return future.result()


class RateLimitedWarnings:
    """Logs at most one warning every `WARNING_INTERVAL_S` seconds, and how many were suppressed since."""

    def __init__(self):
        self._lock = threading.Lock()
        self._last: float | None = None
        self._suppressed = 0

    def __call__(self, message: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._last is not None and now - self._last < WARNING_INTERVAL_S:
                self._suppressed += 1
                return
            suppressed = f" ({self._suppressed} similar warnings suppressed)" if self._suppressed else ""
            self._last, self._suppressed = now, 0
        logger.warning(message + suppressed, extra=ALL_RANKS)
