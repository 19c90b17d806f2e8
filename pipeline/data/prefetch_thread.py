"""A thread that produces the items of an iterator in advance."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
END = object()
POLL_S = 0.2


class PrefetchThread(Generic[T]):
    """Iterates over `items` in a background thread, at most `depth` items ahead of the consumer."""

    def __init__(self, items: Iterator[T], depth: int):
        self.error: Exception | None = None
        """The error that ended the iterator early, set as soon as it is raised."""
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def get(self) -> T:
        """Return the next item. Raise StopIteration after the last one, after an error and after `stop`."""
        while not self._ended:
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                self._ended = self._stopped.is_set()
                continue
            if item is not END:
                return item
            self._ended = True
        raise StopIteration

    def stop(self) -> None:
        """Stop producing items, without waiting for the thread."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and wait until the iterator has produced the item it is working on."""
        self.stop()
        self._thread.join()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except Exception as error:  # raised by the consumer
            self.error = error
        self._put(END)

    def _put(self, item: object) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False
