"""End all ranks with one error, although some of them may be waiting in a collective for the rank that has it.

Invariant: of all announced errors the first one is reported, by rank 0 alone, and every rank exits with code 2.

A rank that waits in a collective cannot be called into another one, so the error goes through the process group's
key-value store, which a thread of each rank polls. A rank ends only when all have read the error: a collective would
otherwise fail on another rank, with another exit code. No rank destroys its process group, because NCCL would wait for
what is unfinished.
"""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from pipeline.distributed.launch import DistInfo

EXIT_CODE = 2
POLL_S = 1.0
READ_TIMEOUT_S = 10.0
"""Longest wait of a rank for the others to read the error, in seconds."""
MESSAGE, READERS, ALL_READ, LEAVERS, ALL_LEFT = "message", "readers", "all read", "leavers", "all left"
"""Keys in the store."""


class AbortChannel:
    """Announces this rank's error to the other ranks, and ends this process if another rank announces one.

    Create one per process when the process group exists, and close it before the group is destroyed.
    """

    def __init__(self, dist_info: DistInfo):
        self._dist_info = dist_info
        # A connection of its own: the main thread may be waiting in the process group's.
        store = _get_default_store().clone()
        self._store = dist.PrefixStore("abort", store)  # pyright: ignore[reportPrivateImportUsage]
        self._closed = threading.Event()
        self._ending = threading.Lock()
        if dist_info.world_size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def announce(self, message: str) -> str:
        """End the processes of all ranks, this one included, because of an error of this rank.

        Returns:
            With one rank, the message; the caller must raise it.
        """
        if self._dist_info.world_size == 1:
            return message
        with suppress(RuntimeError):
            message = self._store.compare_set(MESSAGE, "", message).decode()
        self._end(message)

    def close(self) -> None:
        with self._ending:  # blocks if this process is about to end: its exit code must not be another one
            self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                announced = self._store.check([MESSAGE])
                message = self._store.get(MESSAGE).decode() if announced else ""
            except RuntimeError:  # rank 0, which holds the store, has ended
                return
            if announced:
                self._end(message)

    def _end(self, message: str) -> NoReturn:
        with self._ending:  # never released: the main thread may announce an error too
            if self._dist_info.rank == 0:
                print(f"pipeline: error: {message}", file=sys.stderr, flush=True)
            # No traceback if the main thread's collective fails, because another rank ends a moment before this one.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            with suppress(RuntimeError):  # a rank did not read it in time, or rank 0 has ended first
                if self._store.add(READERS, 1) == self._dist_info.world_size:
                    self._store.set(ALL_READ, "")
                self._store.wait([ALL_READ], timedelta(seconds=READ_TIMEOUT_S))
                if self._dist_info.rank == 0:  # it holds the store, so it ends last
                    self._store.wait([ALL_LEFT], timedelta(seconds=READ_TIMEOUT_S))
                elif self._store.add(LEAVERS, 1) == self._dist_info.world_size - 1:
                    self._store.set(ALL_LEFT, "")
            os._exit(EXIT_CODE)
