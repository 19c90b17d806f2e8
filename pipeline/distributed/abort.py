"""End all ranks with one error, although some of them may be waiting in a collective for the rank that has it.

Invariant: of all announced errors the first one is reported, by rank 0 alone, and every rank exits with code 2.

A rank that waits in a collective cannot be called into another one, so the error goes through the process group's
key-value store, which a thread of each rank polls.
"""

import os
import sys
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from pipeline.distributed.launch import DistInfo

EXIT_CODE = 2
POLL_S = 1.0
GRACE_S = 1.0
READ_TIMEOUT_S = 10.0
"""How long a rank with an error waits for the others to read it: rank 0 takes the store with it when it exits."""
MESSAGE, READERS = "message", "readers"
"""Keys in the store."""


class AbortChannel:
    """Announces this rank's error to the other ranks, and ends this process if another rank announces one.

    Create one per process when the process group exists, and close it before the group is destroyed.
    """

    def __init__(self, dist_info: DistInfo):
        self._dist_info = dist_info
        self._store = dist.PrefixStore("abort", _get_default_store())  # pyright: ignore[reportPrivateImportUsage]
        self._closed = threading.Event()
        if dist_info.world_size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def announce(self, message: str) -> str:
        """Announce an error of this rank, and wait until the other ranks have read it.

        Returns:
            The message of the rank that was the first to announce one. The caller must end this process with it.
        """
        self._closed.set()
        first = self._store.compare_set(MESSAGE, "", message).decode()
        self._wait_for_readers()
        time.sleep(GRACE_S)  # the others end first: a group that this rank destroys would be another error for them
        return first

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if not self._store.check([MESSAGE]):
                    continue
                message = self._store.get(MESSAGE).decode()
                if self._closed.is_set():  # this rank ends by itself
                    return
                if self._dist_info.rank == 0:
                    print(f"pipeline: error: {message}", file=sys.stderr, flush=True)
                self._wait_for_readers()
            except RuntimeError:  # rank 0, which holds the store, has ended
                return
            os._exit(EXIT_CODE)

    def _wait_for_readers(self) -> None:
        """Count this rank as a reader; on rank 0, and if this rank has the error, wait for the others."""
        readers = self._store.add(READERS, 1)
        if self._dist_info.rank and not self._closed.is_set():
            return
        deadline = time.monotonic() + READ_TIMEOUT_S
        while readers < self._dist_info.world_size and time.monotonic() < deadline:
            time.sleep(POLL_S / 20)
            readers = self._store.add(READERS, 0)
        if not self._closed.is_set():
            time.sleep(POLL_S / 5)  # the rank with the error reads the count from this one
