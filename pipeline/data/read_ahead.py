"""Reading ahead: the samples of the coming micro batches, fetched in the background.

Invariant: micro batches come out in the order in which they went in, each with its own samples; readers only
decide when a byte is read. The look-ahead is cut into pieces of consecutive micro batches; inside a piece
every shard is read front to back, neighbours in one read. What is held or under way is bounded by
`limit_bytes` (but at least one micro batch), samples that are not yet read counting as their shard's mean. A
read that fails for good is kept in `failure` at once, and raised when the micro batch that needs it is asked
for: what was read before it can still be trained.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.reader import ShardReader
from pipeline.data.retry import Cancelled
from pipeline.data.sampler import SampleLocation

TASK_BYTES = 4 << 20
"""What a thread reads between two visits to the queue."""


class _Slot:
    """A micro batch on its way."""

    def __init__(self, locations: SampleLocation, expected_bytes: int):
        self.locations = locations
        self.images: list[np.ndarray | None] = [None] * len(locations.sample)
        self.missing = len(self.images)
        self.bytes = expected_bytes
        self.error: Exception | None = None


class _Wanted(NamedTuple):
    """A sample of a task: its place in the shard, and where its image goes."""

    index: int
    slot: _Slot
    row: int


class _Task(NamedTuple):
    shard: int
    wanted: list[_Wanted]


class ReadAhead(Iterator):
    """Iterates over (located, encoded images) of micro batches, forever."""

    def __init__(
        self, reader: ShardReader, batches: Iterator[SampleLocation], threads: int, limit_bytes: int
    ):
        """batches: endless; taken from by the thread that iterates. The reader is closed with this."""
        self._reader, self._batches, self._limit = reader, batches, limit_bytes
        self._slots: deque[_Slot] = deque()
        self._coming: _Slot | None = None
        self._piece_bytes = 0
        self._held = 0
        self._failure: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def failure(self) -> Exception | None:
        """The first error that a reader met, maybe in a micro batch that is still far ahead."""
        return self._failure

    @property
    def held_bytes(self) -> int:
        """What is held or under way."""
        return self._held

    def __next__(self) -> tuple[SampleLocation, list[np.ndarray]]:
        """The next micro batch. Raises what its reading raised, Stopped after `close`."""
        self._extend()
        slot = self._slots[0]
        with self._changed:
            self._changed.wait_for(lambda: slot.error or not slot.missing or self._closed)
            if self._closed:
                raise Cancelled
            if slot.error:
                raise slot.error
            self._slots.popleft()
            self._held -= slot.bytes
        return slot.locations, slot.images

    def close(self) -> None:
        """Ends the reading, whatever it waits for."""
        self._reader.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _extend(self) -> None:
        """Ask for another piece where half of the limit is free.

        Pieces double from one micro batch up to half of the limit, so that the first one comes soon.
        """
        if self._held > self._limit // 2:
            return
        target = min(2 * self._piece_bytes, self._limit // 2)
        piece: list[_Slot] = []
        size = 0
        self._coming = self._coming or self._next_slot()
        while not (self._slots or piece) or (
            size < target and self._held + size + self._coming.bytes <= self._limit
        ):
            piece.append(self._coming)
            size += self._coming.bytes
            self._coming = self._next_slot()
        self._piece_bytes = max(size, self._piece_bytes)
        with self._changed:
            self._held += size
        self._slots.extend(piece)
        for task in self._tasks_of(piece):
            self._tasks.put(task)

    def _next_slot(self) -> _Slot:
        locations = next(self._batches)
        return _Slot(locations, sum(map(self._reader.mean_bytes, locations.shard.tolist())))

    def _tasks_of(self, piece: list[_Slot]) -> Iterator[_Task]:
        """The samples of a piece, shard by shard, front to back, about `TASK_BYTES` at a time."""
        if not piece:
            return
        shards = np.concatenate([slot.locations.shard for slot in piece])
        indexes = np.concatenate([slot.locations.index for slot in piece])
        goals = [(slot, row) for slot in piece for row in range(len(slot.images))]
        task, size = None, 0
        for number in np.lexsort((indexes, shards)).tolist():
            shard = int(shards[number])
            if task is None or task.shard != shard or size >= TASK_BYTES:
                if task:
                    yield task
                task, size = _Task(shard, []), 0
            task.wanted.append(_Wanted(int(indexes[number]), *goals[number]))
            size += self._reader.mean_bytes(shard)
        yield task

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            try:
                images = self._reader.read_many(task.shard, [wanted.index for wanted in task.wanted])
            except Cancelled:
                return
            except Exception as error:  # handed to the thread that asks for the micro batch
                with self._changed:
                    self._failure = self._failure or error
                    for wanted in task.wanted:
                        wanted.slot.error = wanted.slot.error or error
                    self._changed.notify_all()
            else:
                self._deliver(task, images)

    def _deliver(self, task: _Task, images: list[np.ndarray]) -> None:
        expected = self._reader.mean_bytes(task.shard)
        with self._changed:
            for wanted, image in zip(task.wanted, images, strict=True):
                wanted.slot.images[wanted.row] = image
                wanted.slot.missing -= 1
                wanted.slot.bytes += len(image) - expected
                self._held += len(image) - expected
            self._changed.notify_all()
