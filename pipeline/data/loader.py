"""The loader: from the stream's positions to a micro batch of images, noise, labels and names.

Invariant: a micro batch is a function of (recipe, data, step, rank, world size): the same samples, crops,
flips, noise and pixels however often the run was stopped. Stream position n is crop `n mod k` of the stream's
sample `n div k`, where k is data.crops_per_image: the k crops of an image follow each other, and the image is
decoded once for all of them.

`read_ahead` fetches in the background, a thread plans, DALI's own threads decode ahead; `next` waits only
when one of them is late.
"""

import atexit
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.background import Background
from pipeline.data.crops import crop_boxes, flips
from pipeline.data.dali import Decoder, training_graph
from pipeline.data.failures import Failures
from pipeline.data.jpeg import jpeg_size
from pipeline.data.order import Located, rank_positions
from pipeline.data.random import Purpose, uniform
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.sections import DataSection
from pipeline.training_recipe import TrainingRecipe

CROP = 40
"""The bit above a sample's identity at which the number of its crop begins in what random numbers are for."""


class Batch(NamedTuple):
    """One micro batch, on the device."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalised."""
    noise: torch.Tensor
    """(B, noise_size) float32 in [0, 1): the method's randomness."""
    labels: torch.Tensor | None
    """(B,) int64, positions in the manifest's `classes`, of the samples that were decoded; None where nobody
    wants them."""
    located: Located
    """Where the samples are that the stream has here."""
    replaced: int
    """Images that another sample stands in for."""

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the method's forward takes."""
        return (self.images, self.noise) if self.labels is None else (self.images, self.noise, self.labels)


class Planned(NamedTuple):
    """A micro batch of n images, k crops of each, before decoding."""

    located: Located
    """(n,): the stream's samples."""
    read: np.ndarray
    """(n,) which sample of the shard is read: the stream's own, or what stands in for it."""
    encoded: list[np.ndarray]
    boxes: np.ndarray
    """(n, k, 4): x, y, width, height in pixels of the stored image."""
    flips: np.ndarray
    """(n, k)"""
    noise: np.ndarray
    """(n k, noise_size)"""
    labels: np.ndarray | None
    """(n,): of the samples in `read`."""

    def inputs(self, rows: slice = slice(None)) -> tuple:
        """For `dali.training_graph`."""
        boxes, mirrored = self.boxes[rows].astype(np.int32), self.flips[rows].astype(np.int32)
        low = boxes[..., :2].min(axis=1)
        high = (boxes[..., :2] + boxes[..., 2:]).max(axis=1)
        inputs = [self.encoded[rows], low, high - low]
        for crop in range(boxes.shape[1]):
            if boxes.shape[1] > 1:
                inputs += [boxes[:, crop, :2] - low, boxes[:, crop, 2:].copy()]
            inputs.append(mirrored[:, crop].copy())
        return tuple(inputs)


class Planner:
    """Cuts samples: pure, but for what it learns about samples that cannot be decoded."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        failures: Failures,
        labelled: bool = False,
    ):
        self.reader, self.recipe, self.noise_size, self.failures = reader, recipe, noise_size, failures
        self._labels: dict[int, np.ndarray] | None = {} if labelled else None  # of every shard seen so far

    def plan(self, located: Located, encoded: list[np.ndarray]) -> Planned:
        """What to do with a micro batch's samples, located and read."""
        n, k = len(encoded), self.recipe.data.crops_per_image
        read, encoded, sizes = located.index.copy(), list(encoded), np.empty((n, 2), np.int64)
        for row, shard in enumerate(located.shard.tolist()):
            if (stand_in := self.failures.stand_in(shard, int(read[row]))) != read[row]:
                read[row], encoded[row] = stand_in, self.reader.read(shard, stand_in)
            read[row], encoded[row], sizes[row] = self._readable(shard, int(read[row]), encoded[row])
        item = located.sample[:, None] + (np.arange(k) << CROP)
        noise = uniform(self.recipe.seed, Purpose.MASK, located.epoch[:, None], item, self.noise_size)
        boxes, mirrored = self._cut(located.epoch, item, sizes)
        noise = noise.reshape(n * k, self.noise_size)
        return Planned(located, read, encoded, boxes, mirrored, noise, self._labels_of(located.shard, read))

    def replace(self, planned: Planned, row: int, reason: str) -> Planned:
        """The same, with the next sample that has a sound header in place of one that DALI cannot decode."""
        shard, index = int(planned.located.shard[row]), int(planned.read[row])
        self.failures.add(shard, index, reason)
        index = self.failures.stand_in(shard, index)
        index, image, size = self._readable(shard, index, self.reader.read(shard, index))
        read, boxes, mirrored = planned.read.copy(), planned.boxes.copy(), planned.flips.copy()
        encoded = [*planned.encoded[:row], image, *planned.encoded[row + 1 :]]
        read[row] = index
        item = planned.located.sample[row] + (np.arange(boxes.shape[1]) << CROP)
        boxes[row], mirrored[row] = self._cut(planned.located.epoch[row, None], item[None], np.array([size]))
        labels = self._labels_of(planned.located.shard, read)
        return planned._replace(read=read, encoded=encoded, boxes=boxes, flips=mirrored, labels=labels)

    def _labels_of(self, shards: np.ndarray, indexes: np.ndarray) -> np.ndarray | None:
        if self._labels is None:
            return None
        for shard in set(shards.tolist()) - self._labels.keys():
            self._labels[shard] = self.reader.labels(shard)
        pairs = zip(shards.tolist(), indexes.tolist(), strict=True)
        return np.array([self._labels[shard][index] for shard, index in pairs], np.int64)

    def _readable(self, shard: int, index: int, image: np.ndarray) -> tuple[int, np.ndarray, tuple[int, int]]:
        """This sample or the next whose header can be read: its index, its image, its size."""
        while True:
            try:
                return index, image, jpeg_size(image.data)
            except ValueError as error:
                self.failures.add(shard, index, str(error))
                index = self.failures.stand_in(shard, index)
                image = self.reader.read(shard, index)

    def _cut(self, epoch: np.ndarray, item: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, k, 4) and flips (n, k) for items (n, k) in images of `sizes` (n, 2)."""
        data, seed = self.recipe.data, self.recipe.seed
        (n, k), epochs = item.shape, np.repeat(epoch, item.shape[1])
        sizes = np.repeat(sizes, k, axis=0)
        boxes = crop_boxes(seed, epochs, item.ravel(), sizes, data.crop_scale, data.crop_ratio)
        mirrored = flips(seed, epochs, item.ravel()) & data.flip
        return boxes.reshape(n, k, 4), mirrored.reshape(n, k)


class Loader:
    """An endless iterator over this rank's micro batches, from a given global step on."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        threads: int = 1,
        offset: int = 0,
        failures: Failures | None = None,
        labelled: bool = False,
    ):
        """step: the first global step; offset: stream positions that the run has skipped so far, all crops of
        an image or none; labelled: whether batches have labels, which the shard set must hold."""
        if offset % recipe.data.crops_per_image:
            raise ValueError(f"offset {offset}: cuts through an image's {recipe.data.crops_per_image} crops")
        self.reader, self.recipe, self.device = reader, recipe, device
        self.rank, self.world_size = rank, world_size
        self.stream, self.step, self.offset = reader.stream(recipe.seed), step, offset
        self.waited = 0.0
        """Seconds that `next` has waited so far."""
        data = recipe.data
        failures = failures or Failures(reader, data.max_replaced)
        planner = Planner(reader, recipe, noise_size, failures, labelled)
        self._read_ahead = ReadAhead(reader, self._batches(), data.readers, data.read_ahead_mb * 10**6)
        plans = (planner.plan(*read) for read in self._read_ahead)
        self._ahead = Background(plans, prefetch_of(data, device))
        self._decoder = Decoder(
            training_graph(data, device.type == "cuda"),
            self._ahead,
            planner.replace,
            recipe.engine.micro_batch // data.crops_per_image,
            device,
            threads,
            prefetch_of(data, device),
        )
        atexit.register(self.close)  # no thread may be at work when the interpreter ends

    def next(self) -> Batch:
        """The next micro batch. UserError where a sample cannot be read, or too many cannot be decoded."""
        asked = time.perf_counter()
        try:
            planned, images = self._decoder.next()
        except StopIteration:
            raise self._ahead.failure from None
        finally:
            self.waited += time.perf_counter() - asked
        noise = torch.from_numpy(planned.noise).to(self.device, non_blocking=True)
        k = self.recipe.data.crops_per_image
        located = Located(*(np.repeat(field, k) for field in planned.located))
        labels = None
        if planned.labels is not None:
            labels = torch.from_numpy(np.repeat(planned.labels, k)).to(self.device, non_blocking=True)
        replaced = k * int((planned.read != planned.located.index).sum())
        return Batch(images.view(-1, *images.shape[-3:]), noise, labels, located, replaced)

    @property
    def failure(self) -> Exception | None:
        """The first error met while reading ahead; `next` raises it when it comes to the batch it is in."""
        return self._ahead.failure or self._read_ahead.failure

    def keys(self, located: Located) -> list[str]:
        """The samples' keys in the shard set."""
        return [self.reader.key(s, i) for s, i in zip(located.shard, located.index, strict=True)]

    def close(self) -> None:
        atexit.unregister(self.close)
        self._read_ahead.close()
        self._decoder.close()
        self._ahead.close()

    def _batches(self) -> Iterator[Located]:
        """This rank's micro batches of images, forever."""
        data, k = self.recipe.data, self.recipe.data.crops_per_image
        for step in itertools.count(self.step):
            positions = rank_positions(step, data.global_batch, self.rank, self.world_size, self.offset)
            for start in range(0, len(positions), self.recipe.engine.micro_batch):
                yield self.stream.locate(positions[start : start + self.recipe.engine.micro_batch : k] // k)


def prefetch_of(data: DataSection, device: torch.device) -> int:
    """Batches decoded ahead: the recipe's, or by the machine. On the CPU, where decoding and training share
    the cores, more than the next one gains nothing; on a GPU a third rides out a batch of large images."""
    return data.prefetch or (3 if device.type == "cuda" else 2)
