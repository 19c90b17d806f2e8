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

from pipeline.data.dali import Decoder, training_pipeline_def
from pipeline.data.jpeg import jpeg_size
from pipeline.data.philox import Purpose, uniform
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.random_resized_crop import crop_boxes, flips
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation, rank_positions
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.sections import DataSection

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
    locations: SampleLocation
    """Where the samples are that the stream has here."""
    replaced: int
    """Images that another sample stands in for."""

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the method's forward takes."""
        return (self.images, self.noise) if self.labels is None else (self.images, self.noise, self.labels)


class BatchSpec(NamedTuple):
    """A micro batch of n images, k crops of each, before decoding."""

    locations: SampleLocation
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


class BatchBuilder:
    """Cuts samples: pure, but for what it learns about samples that cannot be decoded."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        undecodable: UndecodableSamples,
        labelled: bool = False,
    ):
        self.reader, self.recipe, self.noise_size, self.undecodable = reader, recipe, noise_size, undecodable
        self._labels: dict[int, np.ndarray] | None = {} if labelled else None  # of every shard seen so far

    def plan(self, locations: SampleLocation, encoded: list[np.ndarray]) -> BatchSpec:
        """What to do with a micro batch's samples, located and read."""
        n, k = len(encoded), self.recipe.data.crops_per_image
        read, encoded, sizes = locations.index.copy(), list(encoded), np.empty((n, 2), np.int64)
        for row, shard in enumerate(locations.shard.tolist()):
            if (substitute := self.undecodable.substitute(shard, int(read[row]))) != read[row]:
                read[row], encoded[row] = substitute, self.reader.read(shard, substitute)
            read[row], encoded[row], sizes[row] = self._readable(shard, int(read[row]), encoded[row])
        item = locations.sample[:, None] + (np.arange(k) << CROP)
        noise = uniform(self.recipe.seed, Purpose.MASK, locations.epoch[:, None], item, self.noise_size)
        boxes, mirrored = self._random_resized_crop(locations.epoch, item, sizes)
        noise = noise.reshape(n * k, self.noise_size)
        return BatchSpec(
            locations, read, encoded, boxes, mirrored, noise, self._labels_of(locations.shard, read)
        )

    def replace(self, spec: BatchSpec, row: int, reason: str) -> BatchSpec:
        """The same, with the next sample that has a sound header in place of one that DALI cannot decode."""
        shard, index = int(spec.locations.shard[row]), int(spec.read[row])
        self.undecodable.add(shard, index, reason)
        index = self.undecodable.substitute(shard, index)
        index, image, size = self._readable(shard, index, self.reader.read(shard, index))
        read, boxes, mirrored = spec.read.copy(), spec.boxes.copy(), spec.flips.copy()
        encoded = [*spec.encoded[:row], image, *spec.encoded[row + 1 :]]
        read[row] = index
        item = spec.locations.sample[row] + (np.arange(boxes.shape[1]) << CROP)
        boxes[row], mirrored[row] = self._random_resized_crop(
            spec.locations.epoch[row, None], item[None], np.array([size])
        )
        labels = self._labels_of(spec.locations.shard, read)
        return spec._replace(read=read, encoded=encoded, boxes=boxes, flips=mirrored, labels=labels)

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
                self.undecodable.add(shard, index, str(error))
                index = self.undecodable.substitute(shard, index)
                image = self.reader.read(shard, index)

    def _random_resized_crop(
        self, epoch: np.ndarray, item: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
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
        undecodable: UndecodableSamples | None = None,
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
        undecodable = undecodable or UndecodableSamples(reader, data.max_undecodable)
        batch_builder = BatchBuilder(reader, recipe, noise_size, undecodable, labelled)
        self._read_ahead = ReadAhead(reader, self._batches(), data.read_threads, data.read_ahead_mb * 10**6)
        plans = (batch_builder.plan(*read) for read in self._read_ahead)
        self._ahead = PrefetchThread(plans, prefetch_depth(data, device))
        self._decoder = Decoder(
            training_pipeline_def(data, device.type == "cuda"),
            self._ahead,
            batch_builder.replace,
            recipe.engine.micro_batch // data.crops_per_image,
            device,
            threads,
            prefetch_depth(data, device),
        )
        atexit.register(self.close)  # no thread may be at work when the interpreter ends

    def next(self) -> Batch:
        """The next micro batch. UserError where a sample cannot be read, or too many cannot be decoded."""
        asked = time.perf_counter()
        try:
            spec, images = self._decoder.next()
        except StopIteration:
            raise self._ahead.failure from None
        finally:
            self.waited += time.perf_counter() - asked
        noise = torch.from_numpy(spec.noise).to(self.device, non_blocking=True)
        k = self.recipe.data.crops_per_image
        locations = SampleLocation(*(np.repeat(field, k) for field in spec.locations))
        labels = None
        if spec.labels is not None:
            labels = torch.from_numpy(np.repeat(spec.labels, k)).to(self.device, non_blocking=True)
        replaced = k * int((spec.read != spec.locations.index).sum())
        return Batch(images.view(-1, *images.shape[-3:]), noise, labels, locations, replaced)

    @property
    def failure(self) -> Exception | None:
        """The first error met while reading ahead; `next` raises it when it comes to the batch it is in."""
        return self._ahead.failure or self._read_ahead.failure

    def keys(self, locations: SampleLocation) -> list[str]:
        """The samples' keys in the shard set."""
        return [self.reader.key(s, i) for s, i in zip(locations.shard, locations.index, strict=True)]

    def close(self) -> None:
        atexit.unregister(self.close)
        self._read_ahead.close()
        self._decoder.close()
        self._ahead.close()

    def _batches(self) -> Iterator[SampleLocation]:
        """This rank's micro batches of images, forever."""
        data, k = self.recipe.data, self.recipe.data.crops_per_image
        for step in itertools.count(self.step):
            positions = rank_positions(step, data.global_batch, self.rank, self.world_size, self.offset)
            for start in range(0, len(positions), self.recipe.engine.micro_batch):
                yield self.stream.locate(positions[start : start + self.recipe.engine.micro_batch : k] // k)


def prefetch_depth(data: DataSection, device: torch.device) -> int:
    """Batches decoded ahead: the recipe's, or by the machine. On the CPU, where decoding and training share
    the cores, more than the next one gains nothing; on a GPU a third rides out a batch of large images."""
    return data.prefetch or (3 if device.type == "cuda" else 2)
