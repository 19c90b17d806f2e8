"""Stop requests: signals, a launcher that died, data that cannot be read, files that cannot be written.

Invariant: all ranks stop between the same two steps. With each micro batch the ranks start an all_reduce of their stop
requests, on the CPU; they read its result before the next micro batch, so the network's latency is hidden behind the
computation, and a request takes effect one micro batch late. Micro batches are loaded one ahead: whether every rank has
the next one is known before any rank starts it. Weights change only after a step's last micro batch, so a checkpoint
written then is the state after the previous step.

SIGTERM and SIGUSR1 request a checkpoint and a stop. A thread receives them, also while the main thread waits in a
collective. Repeated signals change nothing; Ctrl-C or SIGKILL ends the process at once.
"""

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import all_gather_object, os_error_to_user_error
from pipeline.distributed.logging import ALL_RANKS
from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout, UserError
from pipeline.train.watchdog import EXTENDED_FACTOR

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Stop requests are integers, so that the ranks can agree on the maximum: a signal's number, or one of these.
LAUNCHER_GONE = 128
"""The launcher died and left its ranks behind."""
DATA_ERROR = 256
"""A rank could not read its data."""
WRITE_ERROR = 512
"""A rank could not write its files. Steps since the last checkpoint will be trained again."""
LAUNCHER_POLL_S = 1.0

Batch = TypeVar("Batch", covariant=True)
T = TypeVar("T")


class BatchSource(Protocol[Batch]):
    """A loader without end."""

    def next(self) -> Batch: ...


class LoadedBatch(NamedTuple, Generic[T]):
    """A micro batch that was loaded ahead."""

    loader: BatchSource[T]
    batch: T | None
    failure: Exception | None
    """Why there is no batch."""
    request: torch.Tensor
    """The ranks' maximal stop request, when `agreement` is complete."""
    agreement: dist.Work


class Failure(NamedTuple):
    """The error that stopped a rank."""

    text: str
    transient: bool
    """Whether the next start may succeed although nobody fixed anything."""


class PreemptionHandler:
    """Handles stop requests of this rank and synchronizes them across ranks.

    Create one per process, before the heavy work starts; call `connect` when the process group exists.
    """

    def __init__(self):
        self.stop_reason = 0
        """The stop request that all ranks agreed on; 0 to continue."""
        self._requested = 0
        self._failure: Exception | None = None
        self._ahead: LoadedBatch | None = None
        self._group: Any = None  # a dist.ProcessGroup
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the C handler writes into the pipe at once
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read_fd,), daemon=True).start()
        if depth := _launcher_depth():
            threading.Thread(target=self._watch_launcher, args=(depth,), daemon=True).start()

    def connect(self, timeout_minutes: float) -> None:
        """Create the CPU group for stop requests. Collective. Its timeout is longer than the watchdog's."""
        timeout = timedelta(minutes=10 + 2 * EXTENDED_FACTOR * timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def raise_if_requested(self) -> None:
        """Raise StoppedEarly if this rank received a signal before the first step. Not collective."""
        if self._requested:
            raise StoppedEarly(
                f"stopped by {_signal_name(self._requested)} before the first step; the same command resumes"
            )

    def next_batch(self, loader: BatchSource[T]) -> T | None:
        """Return the loader's next micro batch, or None on all ranks if one has to stop. Collective.

        Also loads the micro batch after it, whose result a new loader discards.
        """
        ahead = self._ahead
        if ahead is None or ahead.loader is not loader:
            self.discard_ahead()
            ahead = self._load(loader)
        ahead.agreement.wait()
        self.stop_reason = int(ahead.request)
        if self.stop_reason:
            self._ahead = None
            self._failure = self._failure or ahead.failure
            return None
        self._ahead = self._load(loader)
        return ahead.batch

    def discard_ahead(self) -> None:
        """Forget the micro batch that was loaded ahead, also if it could not be read. Collective."""
        if self._ahead:
            self._ahead.agreement.wait()
        self._ahead = None

    @contextmanager
    def catch_write_errors(self) -> Iterator[None]:
        """Turn an OSError inside the block into a stop request: all ranks stop after at most one more step."""
        try:
            yield
        except OSError as error:
            if self._requested != WRITE_ERROR:
                self._failure = os_error_to_user_error(error)
            self._requested = WRITE_ERROR

    def sync_write_errors(self) -> bool:
        """Return whether every rank has written its files without error; if not, all ranks stop. Collective."""
        self._sync(self._requested if self._requested == WRITE_ERROR else self.stop_reason)
        return self.stop_reason != WRITE_ERROR

    def raise_stop_reason(self, saved_step: int) -> None:
        """Raise the error of the agreed stop reason, if there is one. Collective; call it after the last save.

        Raises:
            StoppedEarly: After a signal, or if every failure is transient.
            AllRanksError: If a rank's data or storage has to be fixed.
        """
        if self.stop_reason >= DATA_ERROR:
            if self._failure and not isinstance(self._failure, UserError):
                traceback.print_exception(self._failure)
            failures = all_gather_object(self._failure and describe_failure(self._failure, dist.get_rank()))
            raise exit_error([failure for failure in failures if failure], saved_step)
        if self.stop_reason:
            raise StoppedEarly(
                f"stopped by {_signal_name(self.stop_reason)}, saved at step {saved_step}; the same command resumes"
            )

    def _load(self, loader: BatchSource[T]) -> LoadedBatch[T]:
        """Load a micro batch and start to agree on it: on the requests so far, and on whether every rank has one."""
        batch, failure = None, None
        try:
            batch = loader.next()
        except torch.OutOfMemoryError:  # all ranks end at once
            raise
        except Exception as error:  # all ranks stop for it; `raise_stop_reason` raises it
            failure = os_error_to_user_error(error) if isinstance(error, OSError) else error
        request = torch.tensor(max(self._requested, DATA_ERROR if failure else 0))
        agreement = dist.all_reduce(request, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert agreement is not None
        return LoadedBatch(loader, batch, failure, request, agreement)

    def _sync(self, requested: int) -> None:
        reason = torch.tensor(requested)
        dist.all_reduce(reason, dist.ReduceOp.MAX, group=self._group)
        self.stop_reason = int(reason)

    def _listen(self, read_fd: int) -> None:
        while True:
            number = os.read(read_fd, 1)[0]
            if number in SIGNALS:
                if not self._requested:
                    logger.warning(
                        f"{_signal_name(number)}: saving a checkpoint and stopping after this step", extra=ALL_RANKS
                    )
                self._requested = max(self._requested, number)

    def _watch_launcher(self, depth: int) -> None:
        ancestors, poll = _ancestors(depth), threading.Event()
        while _ancestors(depth) == ancestors:
            poll.wait(LAUNCHER_POLL_S)
        self._requested = max(self._requested, LAUNCHER_GONE)
        logger.warning("launcher died: saving a checkpoint and stopping after this step", extra=ALL_RANKS)


def describe_failure(error: Exception, rank: int) -> Failure:
    """Describe a rank's error. Only UserErrors need a fix; all others are treated as transient."""
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    return Failure(f"rank {rank}: {text}", not is_user_error or isinstance(error, StorageTimeout))


def exit_error(failures: Sequence[Failure], saved_step: int) -> AllRanksError | StoppedEarly:
    """Return the error that ends a run: one that has to be fixed if there is any, else a transient one."""
    first = min(failures, key=lambda failure: failure.transient)
    text = f"{first.text}; {f'saved at step {saved_step}' if saved_step else 'nothing was trained yet'}"
    return StoppedEarly(f"{text}; the same command resumes") if first.transient else AllRanksError(text)


def _launcher_depth() -> int:
    """Return how many ancestors of this process belong to the launcher and live as long as the run."""
    if "CROSS_SIZE" in os.environ:  # DeepSpeed: `deepspeed`, which starts launch.py on each node
        return 2
    # torchrun; `pipeline paper`, which starts commands one after another
    return 1 if {"TORCHELASTIC_RUN_ID", "SHARDMAE_WATCH_PARENT"} & os.environ.keys() else 0


def _ancestors(depth: int) -> list[int]:
    pids = [os.getppid()]
    while len(pids) < depth and pids[-1] > 1:
        try:
            status = Path(f"/proc/{pids[-1]}/stat").read_text()
        except OSError:
            break  # it has just ended
        pids.append(int(status.rpartition(")")[2].split()[1]))
    return pids


def _signal_name(number: int) -> str:
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name
