"""A thread that works ahead."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
END = object()
POLL = 0.2  # seconds between two looks at whether it was closed


class PrefetchThread(Generic[T]):
    """Items of an iterator, made by a thread of its own, at most `depth` ahead of whoever takes them."""

    def __init__(self, items: Iterator[T], depth: int):
        self.failure: Exception | None = None
        """What ended the iterator before its time, known as soon as it happened."""
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(items,), daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next item. After the last one StopIteration, however often it is asked for; also where there is
        a `failure`, and after `stop`."""
        while not self._ended:
            try:
                item = self._queue.get(timeout=POLL)
            except queue.Empty:
                self._ended = self._closed.is_set()
                continue
            if item is not END:
                return item
            self._ended = True
        raise StopIteration

    def stop(self) -> None:
        """Nothing more will be taken."""
        self._closed.set()

    def close(self) -> None:
        """Stops, and waits for the thread, which ends when the iterator has made its next item."""
        self.stop()
        self._thread.join()

    def _work(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except Exception as error:  # raised by whoever takes the items
            self.failure = error
        self._put(END)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL)
                return True
            except queue.Full:
                continue
        return False
