"""Loader of a rank's micro batches: images, noise and labels.

Invariant: a micro batch is a function of (recipe, data, step, rank, world size): samples, crops, flips, noise
and pixels do not depend on how often the run was interrupted. Stream position n is crop `n mod k` of sample
`n div k`, with k = data.crops_per_image: the k crops of an image are consecutive and share one decode.

`ReadAhead` reads in the background, a `PrefetchThread` builds batches, and `Decoder` decodes them; `Loader.next`
waits only if one of them is late.
"""

import atexit
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.dali import Decoder, Inputs, PipelineDef, training_pipeline_def
from pipeline.data.philox import Purpose, uniform
from pipeline.data.pixels import jpeg_size
from pipeline.data.placement import Target
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.random_resized_crop import draw_crop_boxes, draw_flips
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation, rank_positions
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe.sections import DataSection
from pipeline.recipe.training import TrainingRecipe

CROP_SHIFT = 40
"""Crop c of sample i has the random numbers of item `i + (c << CROP_SHIFT)`."""


class Batch(NamedTuple):
    """A micro batch of B images on the device."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalized."""
    noise: torch.Tensor
    """(B, noise_size) float32 in [0, 1): the randomness of the method."""
    labels: torch.Tensor | None
    """(B,) int64 indexes of the manifest's `classes`, of the decoded samples; None if not requested."""
    locations: SampleLocation
    """(B,) the samples at these stream positions."""
    replaced: int
    """Number of images that are a substitute."""
    targets: list[Target] | None = None
    """(B,) what `DenseLoader` makes of the annotations; None for other loaders."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of the method's forward."""
        annotations = (self.labels, self.targets)
        return (self.images, self.noise, *(each for each in annotations if each is not None))


class BatchSpec(NamedTuple):
    """A micro batch of n images with k crops each, before decoding."""

    locations: SampleLocation
    """(n,) the samples at these stream positions."""
    indexes: np.ndarray
    """(n,) index in the shard of the decoded samples: those of `locations` or their substitutes."""
    encoded: list[np.ndarray]
    boxes: np.ndarray
    """(n, k, 4): x, y, width and height in pixels of the stored image."""
    flips: np.ndarray
    """(n, k) bool"""
    noise: np.ndarray
    """(n k, noise_size)"""
    labels: np.ndarray | None
    """(n,) of the decoded samples."""

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        """Return the inputs of `training_pipeline_def` for these images."""
        boxes, flips = self.boxes[rows].astype(np.int32), self.flips[rows].astype(np.int32)
        low = boxes[..., :2].min(axis=1)
        high = (boxes[..., :2] + boxes[..., 2:]).max(axis=1)
        inputs = [self.encoded[rows], low, high - low]
        for crop in range(boxes.shape[1]):
            if boxes.shape[1] > 1:
                inputs += [boxes[:, crop, :2] - low, boxes[:, crop, 2:].copy()]
            inputs.append(flips[:, crop].copy())
        return tuple(inputs)


class BatchBuilder:
    """Draws crops, flips and noise of micro batches, and substitutes undecodable samples."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        undecodable: UndecodableSamples,
        labeled: bool = False,
    ):
        self.reader, self.recipe, self.noise_size, self.undecodable = reader, recipe, noise_size, undecodable
        self._labels: dict[int, np.ndarray] | None = {} if labeled else None  # of each shard used so far

    def build(self, locations: SampleLocation, encoded: list[np.ndarray]) -> BatchSpec:
        """Build a micro batch from samples and their encoded images."""
        n, k = len(encoded), self.recipe.data.crops_per_image
        indexes, encoded, sizes = self._substitute_unreadable(locations, encoded)
        items = locations.sample_id[:, None] + (np.arange(k) << CROP_SHIFT)
        noise = uniform(self.recipe.seed, Purpose.MASK, locations.epoch[:, None], items, self.noise_size)
        boxes, flips = self._draw_crops(locations.epoch, items, sizes)
        noise = noise.reshape(n * k, self.noise_size)
        labels = self._labels_of(locations.shard, indexes)
        return BatchSpec(locations, indexes, encoded, boxes, flips, noise, labels)

    def replace(self, spec: BatchSpec, row: int, reason: str) -> BatchSpec:
        """Substitute the image in a row, which DALI cannot decode."""
        shard, index = int(spec.locations.shard[row]), int(spec.indexes[row])
        self.undecodable.add(shard, index, reason)
        index = self.undecodable.substitute(shard, index)
        index, image, size = self._first_readable(shard, index, self.reader.read(shard, index))
        indexes, boxes, flips = spec.indexes.copy(), spec.boxes.copy(), spec.flips.copy()
        encoded = [*spec.encoded[:row], image, *spec.encoded[row + 1 :]]
        indexes[row] = index
        items = spec.locations.sample_id[row] + (np.arange(boxes.shape[1]) << CROP_SHIFT)
        boxes[row], flips[row] = self._draw_crops(spec.locations.epoch[row, None], items[None], np.array([size]))
        labels = self._labels_of(spec.locations.shard, indexes)
        return spec._replace(indexes=indexes, encoded=encoded, boxes=boxes, flips=flips, labels=labels)

    def _substitute_unreadable(
        self, locations: SampleLocation, encoded: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Return indexes in the shard, encoded images and sizes (n, 2) of the samples or their substitutes."""
        indexes, encoded, sizes = locations.index_in_shard.copy(), list(encoded), np.empty((len(encoded), 2), np.int64)
        for row, shard in enumerate(locations.shard.tolist()):
            index = int(indexes[row])
            if (substitute := self.undecodable.substitute(shard, index)) != index:
                index, encoded[row] = substitute, self.reader.read(shard, substitute)
            indexes[row], encoded[row], sizes[row] = self._first_readable(shard, index, encoded[row])
        return indexes, encoded, sizes

    def _labels_of(self, shards: np.ndarray, indexes: np.ndarray) -> np.ndarray | None:
        if self._labels is None:
            return None
        for shard in set(shards.tolist()) - self._labels.keys():
            self._labels[shard] = self.reader.labels(shard)
        pairs = zip(shards.tolist(), indexes.tolist(), strict=True)
        return np.array([self._labels[shard][index] for shard, index in pairs], np.int64)

    def _first_readable(self, shard: int, index: int, image: np.ndarray) -> tuple[int, np.ndarray, tuple[int, int]]:
        """Return index, image and size of this sample or its first substitute with a valid header."""
        while True:
            try:
                return index, image, jpeg_size(image)
            except ValueError as error:
                self.undecodable.add(shard, index, str(error))
                index = self.undecodable.substitute(shard, index)
                image = self.reader.read(shard, index)

    def _draw_crops(self, epoch: np.ndarray, items: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw boxes (n, k, 4) and flips (n, k) for items (n, k), epochs (n,) and image sizes (n, 2)."""
        data, seed = self.recipe.data, self.recipe.seed
        (n, k), epochs = items.shape, np.repeat(epoch, items.shape[1])
        sizes = np.repeat(sizes, k, axis=0)
        boxes = draw_crop_boxes(seed, epochs, items.ravel(), sizes, data.crop_scale, data.crop_ratio)
        flips = draw_flips(seed, epochs, items.ravel()) & data.flip
        return boxes.reshape(n, k, 4), flips.reshape(n, k)


class Loader:
    """Loads this rank's micro batches, endlessly. A subclass may change what is loaded for an image.

    Args:
        noise_size: random numbers for each image.
        step: first global step.
        threads: decoding threads.
        offset: stream positions that the run has skipped so far, a multiple of data.crops_per_image.
        undecodable: the run's undecodable samples; None starts without any.
        labeled: whether batches have labels; then all shard sets must have them.
    """

    annotation: str | None = None
    """Extension of the samples' files that are read besides the images."""

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
        labeled: bool = False,
    ):
        if offset % recipe.data.crops_per_image:
            raise ValueError(f"offset {offset}: cuts through an image's {recipe.data.crops_per_image} crops")
        self.reader, self.recipe, self.device = reader, recipe, device
        self.rank, self.world_size = rank, world_size
        self.sampler, self.step, self.offset = reader.sampler(recipe.seed), step, offset
        self.wait_s = 0.0
        """Total seconds that `next` took."""
        data = recipe.data
        undecodable = undecodable or UndecodableSamples(reader, data.max_undecodable)
        builder = self._make_builder(noise_size, undecodable, labeled)
        self._read_ahead = ReadAhead(
            reader, self._locate_batches(), data.read_threads, data.read_ahead_mb * 10**6, self.annotation
        )
        depth = prefetch_depth(data, device)
        self._build_thread = PrefetchThread((builder.build(*read) for read in self._read_ahead), depth)
        self._decoder = Decoder(
            self._pipeline_def(),
            self._build_thread,
            builder.replace,
            recipe.engine.micro_batch // data.crops_per_image,
            device,
            threads,
            depth,
        )
        atexit.register(self.close)  # threads must end before the interpreter does

    def next(self) -> Batch:
        """Return the next micro batch.

        Raises:
            UserError: If a sample cannot be read, or more than data.max_undecodable cannot be decoded.
        """
        start = time.perf_counter()
        try:
            spec, images = self._decoder.next()
        finally:
            self.wait_s += time.perf_counter() - start
        return self._make_batch(spec, images)

    def _make_builder(self, noise_size: int, undecodable: UndecodableSamples, labeled: bool) -> BatchBuilder:
        return BatchBuilder(self.reader, self.recipe, noise_size, undecodable, labeled)

    def _pipeline_def(self) -> PipelineDef:
        return training_pipeline_def(self.recipe.data, self.device.type == "cuda")

    def _make_batch(self, spec: Any, images: torch.Tensor) -> Batch:
        """Return the batch of a decoded `BatchSpec`."""
        noise = torch.from_numpy(spec.noise).to(self.device, non_blocking=True)
        k = self.recipe.data.crops_per_image
        locations = SampleLocation(*(np.repeat(field, k) for field in spec.locations))
        labels = None
        if spec.labels is not None:
            labels = torch.from_numpy(np.repeat(spec.labels, k)).to(self.device, non_blocking=True)
        replaced = k * int((spec.indexes != spec.locations.index_in_shard).sum())
        return Batch(images.view(-1, *images.shape[-3:]), noise, labels, locations, replaced)

    def keys(self, locations: SampleLocation) -> list[str]:
        """Return the keys of samples in their shard sets."""
        return [self.reader.key(s, i) for s, i in zip(locations.shard, locations.index_in_shard, strict=True)]

    def close(self) -> None:
        """Cancel reading and decoding, and join the threads."""
        atexit.unregister(self.close)
        self._read_ahead.close()
        self._decoder.close()
        self._build_thread.close()

    def _locate_batches(self) -> Iterator[SampleLocation]:
        """Yield the images of this rank's micro batches, endlessly."""
        data, k = self.recipe.data, self.recipe.data.crops_per_image
        for step in itertools.count(self.step):
            positions = rank_positions(step, data.global_batch, self.rank, self.world_size, self.offset)
            for start in range(0, len(positions), self.recipe.engine.micro_batch):
                yield self.sampler.locate(positions[start : start + self.recipe.engine.micro_batch : k] // k)


def prefetch_depth(data: DataSection, device: torch.device) -> int:
    """Return how many batches to decode ahead: on a GPU 3, which absorbs a batch of large images; on the CPU,
    where decoding and training share the cores, more than 2 gain nothing."""
    return data.prefetch or (3 if device.type == "cuda" else 2)
