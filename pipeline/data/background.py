"""A thread that works ahead."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
END = object()


class Background(Generic[T]):
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
        a `failure`."""
        if not self._ended:
            item = self._queue.get()
            if item is not END:
                return item
            self._ended = True
        raise StopIteration

    def close(self) -> None:
        """Ends the thread as soon as the iterator gives it the word."""
        self._closed.set()
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
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
