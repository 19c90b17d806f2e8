"""Builds shards in several processes.

Invariant: no process outlives its use. A worker that loses its parent ends at the next image; a worker that
dies or fails ends the others, and the build stops with one clear error and every finished shard kept.
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
from typing import Any

from data_prep.build_shard import Job, build_shard, is_finished
from data_prep.errors import StoppedEarly, UserError
from data_prep.shard_set import remove_leftovers
from data_prep.source_reader import Reader

_REPORT_SECONDS = 0.2

Totals = tuple[int, int, int, int, int]
"""Since the last report: images, bytes read, bytes packed, repaired, quarantined."""


def build_shards(
    job: Job, numbers: Iterable[int], workers: int, on_progress: Callable[[Totals], None]
) -> None:
    """Builds the shards `numbers` that are not finished yet; workers >= 1.

    Raises UserError (source or disk), StoppedEarly (a worker was killed, or this process was told to stop).
    """
    numbers = list(numbers)
    workers = min(workers, len(numbers))
    context = multiprocessing.get_context("fork")  # the plan of millions of samples is shared, not sent
    connections: list[Connection] = []
    processes = []
    stop_reader, stop_writer = context.Pipe(duplex=False)

    def stop(_signal, _frame) -> None:
        # Raising here could happen anywhere, also where Python swallows it: the loop below is told instead.
        stop_writer.send(None)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs, [*connections, ours]), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        _dispatch(numbers, dict(zip(connections, processes, strict=True)), stop_reader, on_progress)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for process in processes:
            remove_leftovers(job.directory, process.pid)


def _dispatch(numbers: list[int], owner: dict[Connection, Any], stop: Connection, on_progress) -> None:
    """owner: the process behind each connection. stop: becomes readable when this process is to stop."""
    waiting = iter(numbers)
    for connection in owner:
        _send_task(connection, next(waiting, None))
    while owner:
        for connection in wait([stop, *owner]):
            if connection is stop:
                raise StoppedEarly("stopped; finished shards are kept and the same command continues")
            try:
                kind, content = connection.recv()
            except (EOFError, ConnectionResetError):
                process = owner.pop(connection)
                process.join()
                raise StoppedEarly(
                    f"a worker was killed ({_ending(process.exitcode)}; out of memory, perhaps); "
                    "finished shards are kept and the same command continues"
                ) from None
            if kind == "progress":
                on_progress(content)
            elif kind == "done":
                number = next(waiting, None)
                _send_task(connection, number)
                if number is None:
                    owner.pop(connection)
            elif kind == "user_error":
                raise UserError(content)
            else:
                raise RuntimeError(f"in a worker:\n{content}")


def _send_task(connection: Connection, number: int | None) -> None:
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # receiving from it will say that it is dead
        connection.send(number)


def _work(job: Job, connection: Connection, others: list[Connection]) -> None:
    for other in others:  # an inherited end would keep a pipe open after its owner died
        other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    parent = os.getppid()
    reader = Reader(job.source.root)
    totals, last = [0] * 5, time.monotonic()

    def report(*counts: int) -> None:
        nonlocal last
        if os.getppid() != parent:
            os._exit(1)
        totals[0] += 1
        for i, count in enumerate(counts, 1):
            totals[i] += count
        if time.monotonic() - last > _REPORT_SECONDS:
            flush()

    def flush() -> None:
        nonlocal last
        connection.send(("progress", tuple(totals)))
        totals[:], last = [0] * 5, time.monotonic()

    try:
        while (number := connection.recv()) is not None:
            if not is_finished(job, number):
                build_shard(job, number, reader, report)
                flush()
            connection.send(("done", number))
    except (EOFError, BrokenPipeError):
        os._exit(1)
    except UserError as error:
        connection.send(("user_error", str(error)))
    except BaseException:
        connection.send(("crash", traceback.format_exc()))
    finally:
        sys.stderr.flush()


def _ending(exitcode: int | None) -> str:
    return f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
