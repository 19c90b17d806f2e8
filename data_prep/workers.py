"""Run the numbered parts of a job, such as the shards of a build, in several processes.

Invariant: no process outlives the build. A worker whose parent is gone exits after the current image. If a
worker dies or fails, the others are ended, and the job stops with one error and keeps every finished part.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from data_prep.errors import StoppedEarly, UserError
from data_prep.shard_set import remove_temporary_files

_REPORT_SECONDS = 0.2
_RESUME_HINT = "finished shards are kept; run the same command again to continue"

Totals = tuple[int, int, int, int, int]
"""Since the last report: images, bytes read, bytes written, repaired, quarantined."""

CountInput = Callable[[int, int, int, int], None]
"""Called after each input with bytes read, bytes written, 1 if repaired, 1 if quarantined."""


class Job(Protocol):
    """Numbered parts that any process can do alone, in any order, and twice."""

    @property
    def directory(self) -> Path:
        """The shard set that is built."""
        ...

    def is_finished(self, number: int) -> bool:
        """Return whether an earlier run has done this part and its result is intact."""
        ...

    def open(self) -> Callable[[int, CountInput], None]:
        """Open what a process needs. Returns the function that does a part; it raises UserError if it cannot."""
        ...


def run_in_workers(job: Job, numbers: Iterable[int], workers: int, on_progress: Callable[[Totals], None]) -> None:
    """Do those of the parts `numbers` that are not finished, in up to `workers` processes.

    Raises:
        UserError: If the source or the disk fails.
        StoppedEarly: If a worker was killed, or this process received SIGTERM or SIGINT.
    """
    numbers = list(numbers)
    workers = min(workers, len(numbers))
    context = multiprocessing.get_context("fork")  # shares the plan's memory instead of sending it
    processes: dict[Connection, BaseProcess] = {}
    stop_reader, stop_writer = context.Pipe(duplex=False)

    def stop(_signal, _frame) -> None:
        # An exception raised here could be lost in code that suppresses it, so wake up _dispatch instead.
        stop_writer.send(None)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for _ in range(workers):
            parent_end, worker_end = context.Pipe()
            process = context.Process(target=_work, args=(job, worker_end, [*processes, parent_end]), daemon=True)
            process.start()
            worker_end.close()
            processes[parent_end] = process
        _dispatch(numbers, dict(processes), stop_reader, on_progress)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()
            assert process.pid is not None
            remove_temporary_files(job.directory, process.pid)


def _dispatch(
    numbers: list[int],
    processes: dict[Connection, BaseProcess],
    stop: Connection,
    on_progress: Callable[[Totals], None],
) -> None:
    """Hand out numbers until all are done. `stop` becomes readable on a signal to this process."""
    pending = iter(numbers)
    for connection in processes:
        _send_task(connection, next(pending, None))
    while processes:
        ready = wait([stop, *processes])
        if stop in ready:
            raise StoppedEarly(f"stopped; {_RESUME_HINT}")
        for connection in [connection for connection in processes if connection in ready]:
            try:
                kind, content = connection.recv()
            except (EOFError, ConnectionResetError) as error:
                process = processes.pop(connection)
                process.join()
                code = process.exitcode or 0
                ending = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise StoppedEarly(f"a worker was killed ({ending}; possibly out of memory); {_RESUME_HINT}") from error
            if kind == "progress":
                on_progress(content)
            elif kind == "done":
                number = next(pending, None)
                _send_task(connection, number)
                if number is None:
                    processes.pop(connection)
            elif kind == "user_error":
                raise UserError(content)
            else:
                raise RuntimeError(f"in a worker:\n{content}")


def _send_task(connection: Connection, number: int | None) -> None:
    # If the worker is dead, receiving from it raises the error.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(number)


def _work(job: Job, connection: Connection, inherited: list[Connection]) -> None:
    for other in inherited:  # an inherited end would keep a pipe open after its owner died
        other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends its workers
    parent = os.getppid()
    run_part = job.open()
    totals, last_report = [0] * 5, time.monotonic()

    def count_input(*counts: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        totals[0] += 1
        for i, count in enumerate(counts, 1):
            totals[i] += count
        if time.monotonic() - last_report > _REPORT_SECONDS:
            report()

    def report() -> None:
        nonlocal last_report
        connection.send(("progress", tuple(totals)))
        totals[:], last_report = [0] * 5, time.monotonic()

    try:
        try:
            while (number := connection.recv()) is not None:
                if not job.is_finished(number):
                    run_part(number, count_input)
                    report()
                connection.send(("done", number))
        except (EOFError, ConnectionError):
            raise
        except UserError as error:
            connection.send(("user_error", str(error)))
        except BaseException:
            connection.send(("crash", traceback.format_exc()))
    except (EOFError, ConnectionError):  # the parent is gone, or has closed the connection because of another worker
        os._exit(1)
    finally:
        sys.stderr.flush()
