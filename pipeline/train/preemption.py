"""How a run stops before its end: a signal, a launcher that is gone, data that cannot be read, a full disk.

Invariant: all ranks stop at the same place, between two steps. Whatever one rank has heard, the others hear
before the next micro batch is computed, by a tiny all-reduce on the CPU that no device waits for. Until a
step's last micro batch no weight has changed, so what is saved then is the state after the step before.

A first SIGTERM or SIGUSR1 asks the run to save and stop; a second one ends the process at once, wherever it
is. Both are heard by a thread of their own, also while the main thread waits in a collective.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import all_gather_object, storage_error
from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout, UserError
from pipeline.train.watchdog import EXTENDED_FACTOR

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_GONE = 128
"""Stands among the signal numbers for a launcher that died and left its ranks behind."""
DATA_ERROR = 256
"""More than any signal: some rank could not read its data."""
WRITE_ERROR = 512
"""Some rank could not write its own files. What was trained since the last checkpoint is trained again."""
POLL = 1.0  # seconds between two looks at the launcher
SAME = 1.0
"""Seconds within which the same signal again is the first one, come to a process and to its group."""


class Failure(NamedTuple):
    """What made a rank stop."""

    text: str
    transient: bool
    """Whether the next start may go on though nobody mended anything."""


def describe_failure(error: Exception, rank: int) -> Failure:
    """Of what is no UserError nobody knows what to mend."""
    known = isinstance(error, UserError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return Failure(f"rank {rank}: {text}", not known or isinstance(error, StorageTimeout))


def exit_error(failures: Sequence[Failure], step: int) -> AllRanksError | StoppedEarly:
    """How a run ends that is saved at `step`, by what its ranks met: to be mended where one of it must be."""
    first = min(failures, key=lambda failure: failure.transient)
    text = f"{first.text}. {f'Everything is saved at step {step}' if step else 'Nothing was trained yet'}"
    return StoppedEarly(f"{text}; the same command continues") if first.transient else AllRanksError(text)


class PreemptionHandler:
    """Hears what this rank is told, and agrees with the others on it. One a process, made before the run's
    heavy work begins; `connect` follows when the ranks are connected."""

    def __init__(self):
        self.reason: int = 0
        """Not 0 once all ranks have agreed to stop: what made them."""
        self._heard = 0
        self._failure: Exception | None = None
        self._group = None
        self._first, self._heard_at = 0, 0.0
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # Python's part; the C part writes into the pipe at once
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        if depth := _launcher_depth():
            threading.Thread(target=self._watch_launcher, args=(depth,), daemon=True).start()

    def connect(self, timeout_minutes: float) -> None:
        """Every rank calls it, after they have joined. It waits longer than the watchdog's time-out."""
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(minutes=10 + 2 * EXTENDED_FACTOR * timeout_minutes)
        )

    def check(self) -> None:
        """StoppedEarly where this rank was told to stop: for what ranks do alone, inside `agreed`, before
        there are steps and anything to save."""
        if self._heard:
            raise StoppedEarly(
                f"stopped early by {_signal_name(self._heard)}, before this start's first step; the same command "
                "continues"
            )

    def next(self, loader) -> object | None:
        """The loader's next micro batch, or None on all ranks where one of them was told to stop or cannot
        read its data. Every rank calls it."""
        batch = None
        try:
            batch = loader.next()
        except Exception as error:  # all ranks stop for it, and this one raises it in `raise_reason`
            self._failure = storage_error(error) if isinstance(error, OSError) else error
            self._heard = max(self._heard, DATA_ERROR)
        self._agree(self._heard)
        return None if self.reason else batch

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around what this rank writes by itself: where its storage says no, all ranks stop before the next
        step."""
        try:
            yield
        except OSError as error:
            if self._heard != WRITE_ERROR:
                self._failure = storage_error(error)
            self._heard = WRITE_ERROR

    def sync_write_errors(self) -> bool:
        """Whether every rank's writing went well; else all stop. Every rank calls it."""
        self._agree(self._heard if self._heard == WRITE_ERROR else self.reason)
        return self.reason != WRITE_ERROR

    def _agree(self, heard: int) -> None:
        said = torch.tensor(heard)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
        self.reason = int(said)

    def raise_reason(self, step: int) -> None:
        """Nothing where the run went to its end. Else `StoppedEarly`, or the error of a rank whose data or
        storage somebody must mend. Every rank calls it, when everything is saved."""
        if self.reason >= DATA_ERROR:
            if self._failure and not isinstance(self._failure, UserError):
                traceback.print_exception(self._failure)
            failures = all_gather_object(self._failure and describe_failure(self._failure, dist.get_rank()))
            raise exit_error([failure for failure in failures if failure], step)
        if self.reason:
            raise StoppedEarly(
                f"stopped early by {_signal_name(self.reason)}, everything is saved at step {step}; "
                "the same command continues"
            )

    def _listen(self, reading: int) -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number not in SIGNALS:
                continue
            if number == self._first and time.monotonic() - self._heard_at < SAME:
                continue
            if self._first:
                _say(f"{_signal_name(number)} again: stopping at once; the last checkpoint is whole")
                os._exit(128 + number)
            self._first, self._heard_at = number, time.monotonic()
            self._heard = max(self._heard, number)
            _say(f"{_signal_name(number)}: saving and stopping after this step; once more stops at once")

    def _watch_launcher(self, depth: int) -> None:
        before, sleep = _ancestors(depth), threading.Event()
        while _ancestors(depth) == before:
            sleep.wait(POLL)
        self._heard = max(self._heard, LAUNCHER_GONE)
        _say("the launcher is gone: saving and stopping after this step")


def _launcher_depth() -> int:
    """How many processes above this one belong to the launcher and live as long as the run."""
    if "CROSS_SIZE" in os.environ:  # DeepSpeed: `deepspeed`, and below it one launch.py a node
        return 2
    return 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _ancestors(depth: int) -> list[int]:
    found = [os.getppid()]
    while len(found) < depth and found[-1] > 1:
        try:
            status = Path(f"/proc/{found[-1]}/stat").read_text()
        except OSError:
            break  # it has just ended
        found.append(int(status.rpartition(")")[2].split()[1]))
    return found


def _signal_name(number: int) -> str:
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


def _say(text: str) -> None:
    print(f"pipeline: {text}", file=sys.stderr, flush=True)
