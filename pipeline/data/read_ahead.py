"""Read the encoded images of coming micro batches in the background.

Invariant: micro batches come out in the order in which they went in, each with its own samples; the threads
only affect when a byte is read. The look-ahead is divided into groups of consecutive micro batches; within a
group every shard is read front to back, and neighboring samples in one read. At most `max_bytes` are buffered or
being read (but at least one micro batch); until a sample is read it counts as its shard's mean size. An error is
raised when its micro batch is requested, so the batches before it can still be trained on.
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
"""Approximate bytes that a thread reads at a time."""


class _PendingBatch:
    """A micro batch that is being read."""

    def __init__(self, locations: SampleLocation, expected_bytes: int):
        self.locations = locations
        self.images: list[np.ndarray] = [np.empty(0, np.uint8)] * len(locations.sample_id)
        self.annotations = list(self.images)
        self.num_missing = len(self.images)
        self.bytes = expected_bytes
        self.error: Exception | None = None


class _Request(NamedTuple):
    """A sample to read, and the row of a batch to store it in."""

    index_in_shard: int
    batch: _PendingBatch
    row: int


class _Task(NamedTuple):
    shard: int
    requests: list[_Request]


class ReadAhead(Iterator):
    """Iterates endlessly over the (locations, encoded images) of micro batches; with annotations, over triples.

    Args:
        reader: closed together with this iterator.
        batches: endless; consumed by the thread that iterates.
        threads: number of reading threads.
        max_bytes: limit of the buffered images.
        annotation: extension of the samples' annotations ("json", "png") to read as well; None reads only images.
    """

    def __init__(
        self,
        reader: ShardReader,
        batches: Iterator[SampleLocation],
        threads: int,
        max_bytes: int,
        annotation: str | None = None,
    ):
        self._reader, self._batches, self._max_bytes, self._annotation = reader, batches, max_bytes, annotation
        self._pending: deque[_PendingBatch] = deque()
        self._next_batch: _PendingBatch | None = None
        self._group_bytes = 0
        self.buffered_bytes = 0
        """Bytes buffered or being read."""
        self._closed = False
        self._changed = threading.Condition()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> tuple:
        """Return the next micro batch; raise its read error, or Cancelled after `close`."""
        self._schedule()
        batch = self._pending[0]
        with self._changed:
            self._changed.wait_for(lambda: batch.error or not batch.num_missing or self._closed)
            if self._closed:
                raise Cancelled
            if batch.error:
                raise batch.error
            self._pending.popleft()
            self.buffered_bytes -= batch.bytes
        if self._annotation:
            return batch.locations, batch.images, batch.annotations
        return batch.locations, batch.images

    def close(self) -> None:
        """Cancel all reads and join the threads."""
        self._reader.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _schedule(self) -> None:
        """Schedule another group of micro batches if half of the limit is free.

        Groups double from one micro batch up to half of the limit, so that the first batch arrives early.
        """
        if self.buffered_bytes > self._max_bytes // 2:
            return
        target = min(2 * self._group_bytes, self._max_bytes // 2)
        group: list[_PendingBatch] = []
        size = 0
        coming = self._next_batch or self._take_batch()
        while not (self._pending or group) or (
            size < target and self.buffered_bytes + size + coming.bytes <= self._max_bytes
        ):
            group.append(coming)
            size += coming.bytes
            coming = self._take_batch()
        self._next_batch = coming
        self._group_bytes = max(size, self._group_bytes)
        with self._changed:
            self.buffered_bytes += size
        self._pending.extend(group)
        for task in self._split_into_tasks(group):
            self._tasks.put(task)

    def _take_batch(self) -> _PendingBatch:
        locations = next(self._batches)
        return _PendingBatch(locations, sum(map(self._reader.mean_bytes, locations.shard.tolist())))

    def _split_into_tasks(self, group: list[_PendingBatch]) -> Iterator[_Task]:
        """Yield the samples of a group shard by shard, front to back, about `TASK_BYTES` at a time."""
        if not group:
            return
        shards = np.concatenate([batch.locations.shard for batch in group])
        indexes = np.concatenate([batch.locations.index_in_shard for batch in group])
        rows = [(batch, row) for batch in group for row in range(len(batch.images))]
        order = np.lexsort((indexes, shards)).tolist()
        task, size = _Task(int(shards[order[0]]), []), 0
        for number in order:
            shard = int(shards[number])
            if task.shard != shard or size >= TASK_BYTES:
                yield task
                task, size = _Task(shard, []), 0
            task.requests.append(_Request(int(indexes[number]), *rows[number]))
            size += self._reader.mean_bytes(shard)
        yield task

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            try:
                indexes = [request.index_in_shard for request in task.requests]
                images = self._reader.read_many(task.shard, indexes)
                annotations = self._reader.read_many(task.shard, indexes, self._annotation) if self._annotation else []
            except Cancelled:
                return
            except Exception as error:  # raised by the thread that requests the micro batch
                with self._changed:
                    for request in task.requests:
                        request.batch.error = request.batch.error or error
                    self._changed.notify_all()
            else:
                self._store(task, images, annotations)

    def _store(self, task: _Task, images: list[np.ndarray], annotations: list[np.ndarray]) -> None:
        expected = self._reader.mean_bytes(task.shard)
        with self._changed:
            for request, image in zip(task.requests, images, strict=True):
                request.batch.images[request.row] = image
                request.batch.num_missing -= 1
                request.batch.bytes += len(image) - expected
                self.buffered_bytes += len(image) - expected
            for request, annotation in zip(task.requests, annotations, strict=False):
                request.batch.annotations[request.row] = annotation
            self._changed.notify_all()
