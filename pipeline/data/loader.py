"""Loader of a rank's micro batches: images, noise and labels.

Invariant: a micro batch is a function of (recipe, data, step, rank, world size): samples, crops, flips, noise
and pixels do not depend on how often the run was interrupted. Stream position n is crop `n mod k` of sample
`n div k`, with k = data.crops_per_image: the k crops of an image are consecutive and share one decode.

`ReadAhead` reads in the background, a `PrefetchThread` builds batches, and `ImageDecoder` decodes them; `Loader.next`
waits only if one of them is late. On a GPU it never waits for the device: noise and labels are in page-locked memory.
"""

import atexit
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.augment import color_jitter
from pipeline.data.dali import Inputs, PipelineDef, training_pipeline_def
from pipeline.data.decode_options import decode_options, prefetch_depth
from pipeline.data.decoder import ImageDecoder
from pipeline.data.fixed_size_crop import center_boxes, draw_fixed_size_boxes
from pipeline.data.philox import Purpose, uniform
from pipeline.data.pixels import jpeg_size
from pipeline.data.placement import Target
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.random_resized_crop import draw_crop_boxes, draw_flips
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation, rank_positions
from pipeline.data.transfer import copy_to_device, pin_for
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe.sections import eval_crop_pct
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
    noise: torch.Tensor
    """(n k, noise_size) on the host, pinned if the device is a GPU."""
    labels: torch.Tensor | None
    """(n k,) of the decoded samples, like the noise."""

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
    """Draws crops, flips and noise of micro batches, and substitutes undecodable samples.

    Args:
        pin: Returns a host tensor's copy in the memory from which it will be copied to the device.
    """

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        undecodable: UndecodableSamples,
        labeled: bool = False,
        pin: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ):
        self.reader, self.recipe, self.noise_size, self.undecodable = reader, recipe, noise_size, undecodable
        self._pin = pin
        self._labels: dict[int, np.ndarray] | None = {} if labeled else None  # of each shard used so far

    def build(self, locations: SampleLocation, encoded: list[np.ndarray]) -> BatchSpec:
        """Build a micro batch from samples and their encoded images."""
        n, k = len(encoded), self.recipe.data.crops_per_image
        indexes, encoded, sizes = self._substitute_unreadable(locations, encoded)
        items = locations.sample_id[:, None] + (np.arange(k) << CROP_SHIFT)
        noise = uniform(self.recipe.seed, Purpose.MASK, locations.epoch[:, None], items, self.noise_size)
        boxes, flips = self._draw_crops(locations.epoch, items, sizes)
        noise = self._pin(torch.from_numpy(noise.reshape(n * k, self.noise_size)))
        labels = self._labels_of(locations.shard, indexes)
        return BatchSpec(locations, indexes, encoded, boxes, flips, noise, labels)

    def replace(self, spec: BatchSpec, row: int, reason: str) -> BatchSpec:
        """Substitute the image in a row, which DALI cannot decode."""
        shard, index = int(spec.locations.shard[row]), int(spec.indexes[row])
        self.undecodable.add(shard, index, reason, confirmed=False)
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

    def _labels_of(self, shards: np.ndarray, indexes: np.ndarray) -> torch.Tensor | None:
        if self._labels is None:
            return None
        for shard in set(shards.tolist()) - self._labels.keys():
            self._labels[shard] = self.reader.labels(shard)
        pairs = zip(shards.tolist(), indexes.tolist(), strict=True)
        labels = np.array([self._labels[shard][index] for shard, index in pairs], np.int64)
        return self._pin(torch.from_numpy(np.repeat(labels, self.recipe.data.crops_per_image)))

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
        if data.augmentation == "none":
            boxes = center_boxes(sizes, eval_crop_pct(data.image_size))
        elif data.augmentation == "fixed_size":
            boxes = draw_fixed_size_boxes(seed, epochs, items.ravel(), sizes, eval_crop_pct(data.image_size))
        else:
            boxes = draw_crop_boxes(seed, epochs, items.ravel(), sizes, data.crop_scale, data.crop_ratio)
        flips = draw_flips(seed, epochs, items.ravel()) & (data.flip and data.augmentation != "none")
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
        deterministic: on a GPU, decode an image to the same pixels whatever its batch is; see `decode_options`.
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
        deterministic: bool = False,
    ):
        if offset % recipe.data.crops_per_image:
            raise ValueError(f"offset {offset}: cuts through an image's {recipe.data.crops_per_image} crops")
        self.reader, self.recipe, self.device = reader, recipe, device
        self.rank, self.world_size = rank, world_size
        self.sampler, self.step, self.offset = reader.sampler(recipe.seed), step, offset
        self.wait_s = 0.0
        """Total seconds that `next` took."""
        data = recipe.data
        self._mean_std = torch.tensor([data.mean, data.std])[:, :, None, None].to(device)
        undecodable = undecodable or UndecodableSamples(reader, data.max_undecodable)
        builder = self._make_builder(noise_size, undecodable, labeled)
        self._read_ahead = ReadAhead(
            reader, self._locate_batches(), data.read_threads, data.read_ahead_mb * 10**6, self.annotation
        )
        depth = prefetch_depth(data, device)
        self._build_thread = PrefetchThread((builder.build(*read) for read in self._read_ahead), depth)
        self._decoder = ImageDecoder(
            self._pipeline_def(deterministic),
            self._build_thread,
            builder.replace,
            recipe.engine.micro_batch // data.crops_per_image,
            device,
            threads,
            depth,
            undecodable.confirm,
        )
        atexit.register(self.close)  # threads must end before the interpreter does

    def next(self) -> Batch:
        """Return the next micro batch.

        Raises:
            UserError: If a sample cannot be read, more than data.max_undecodable cannot be decoded, or the device has
                not enough memory.
            DeviceError: If the device failed.
        """
        start = time.perf_counter()
        try:
            spec, images = self._decoder.next()
        finally:
            self.wait_s += time.perf_counter() - start
        return self._make_batch(spec, images)

    def _make_builder(self, noise_size: int, undecodable: UndecodableSamples, labeled: bool) -> BatchBuilder:
        pin = partial(pin_for, device=self.device)
        return BatchBuilder(self.reader, self.recipe, noise_size, undecodable, labeled, pin)

    def _pipeline_def(self, deterministic: bool) -> PipelineDef:
        options = decode_options(self.recipe.data, self.device, deterministic)
        return training_pipeline_def(self.recipe.data, options)

    def _make_batch(self, spec: Any, images: torch.Tensor) -> Batch:
        """Return the batch of a decoded `BatchSpec`."""
        noise = spec.noise.to(self.device, non_blocking=True)
        labels = None if spec.labels is None else spec.labels.to(self.device, non_blocking=True)
        k = self.recipe.data.crops_per_image
        locations = SampleLocation(*(np.repeat(field, k) for field in spec.locations))
        replaced = k * int((spec.indexes != spec.locations.index_in_shard).sum())
        images = images.view(-1, *images.shape[-3:])
        if self.recipe.data.augmentation == "color_jitter":
            images = self._jitter_colors(images, locations)
        return Batch(images, noise, labels, locations, replaced)

    def keys(self, locations: SampleLocation) -> list[str]:
        """Return the keys of samples in their shard sets."""
        return [self.reader.key(s, i) for s, i in zip(locations.shard, locations.index_in_shard, strict=True)]

    def close(self) -> None:
        """Cancel reading and decoding, and join the threads."""
        atexit.unregister(self.close)
        self._read_ahead.close()
        self._decoder.close()
        self._build_thread.close()

    def _jitter_colors(self, images: torch.Tensor, locations: SampleLocation) -> torch.Tensor:
        """Jitter the colors of normalized images (B, 3, H, W) of B crops."""
        data = self.recipe.data
        crops = np.arange(len(images)) % data.crops_per_image
        items = locations.sample_id + (crops << CROP_SHIFT)
        noise = uniform(self.recipe.seed, Purpose.COLOR, locations.epoch, items, color_jitter.NOISE_DIM)
        mean, std = self._mean_std
        jittered = color_jitter.jitter_colors(images * std + mean, copy_to_device(torch.from_numpy(noise), self.device))
        return (jittered - mean) / std

    def _locate_batches(self) -> Iterator[SampleLocation]:
        """Yield the images of this rank's micro batches, endlessly."""
        data, k = self.recipe.data, self.recipe.data.crops_per_image
        for step in itertools.count(self.step):
            positions = rank_positions(step, data.global_batch, self.rank, self.world_size, self.offset)
            for start in range(0, len(positions), self.recipe.engine.micro_batch):
                yield self.sampler.locate(positions[start : start + self.recipe.engine.micro_batch : k] // k)
