"""Decode and augment: DALI turns the planned samples into images on the device.

Invariant: DALI decides nothing. It is given each sample's bytes, crop box and flip, decodes only the box,
resizes it as Pillow does (bicubic, antialiased) and normalises. The same plan therefore gives the same
pixels, on any number of ranks and after any restart; on a GPU (`mixed` decode) as on a CPU.

`read_ahead` fetches in the background, a thread plans, DALI's own threads decode ahead; `next` waits only
when one of them is late.
"""

import io
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from pipeline.data.crops import crop_boxes, flips
from pipeline.data.jpeg import jpeg_size
from pipeline.data.order import Located, rank_positions
from pipeline.data.patience import Stopped
from pipeline.data.random import Purpose, uniform
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import Recipe


class Batch(NamedTuple):
    """One micro batch, on the device."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalised."""
    noise: torch.Tensor
    """(B, noise_size) float32 in [0, 1): the method's randomness."""
    located: Located
    """Where the samples come from."""


class Planned(NamedTuple):
    """A micro batch before decoding."""

    located: Located
    encoded: list[np.ndarray]
    boxes: np.ndarray
    flips: np.ndarray
    noise: np.ndarray


class Loader:
    """An endless iterator over this rank's micro batches, from a given global step on."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: Recipe,
        noise_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        threads: int = 1,
        offset: int = 0,
    ):
        """step: the first global step; offset: stream positions that the run has skipped so far."""
        self.reader, self.recipe, self.noise_size, self.device = reader, recipe, noise_size, device
        self.rank, self.world_size = rank, world_size
        self.stream, self.step, self.offset = reader.stream(recipe.seed), step, offset
        self._planned: queue.Queue[Planned | Exception] = queue.Queue(maxsize=recipe.data.prefetch)
        self._in_flight: list[Planned] = []
        self._failure: Exception | None = None
        self._closed = threading.Event()
        data = recipe.data
        self._read_ahead = ReadAhead(reader, self._batches(), data.readers, data.read_ahead_mb * 10**6)
        self._planner = threading.Thread(target=self._plan_ahead, daemon=True)
        self._planner.start()
        self._pipeline = self._build(threads)

    def next(self) -> Batch:
        """The next micro batch. UserError where a sample cannot be read or decoded."""
        try:
            # On torch's stream, so that DALI reuses the memory only after the copy below.
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            (decoded,) = self._pipeline.run(stream)
        except RuntimeError as error:
            raise self._blame(error) from error
        planned = self._in_flight.pop(0)
        # A copy, because DALI writes its next batch into the same memory.
        images = torch.from_dlpack(decoded.as_tensor()).clone()
        noise = torch.from_numpy(planned.noise)
        return Batch(images, noise.to(self.device, non_blocking=True), planned.located)

    @property
    def failure(self) -> Exception | None:
        """The first error met while reading ahead; `next` raises it when it comes to the batch it is in."""
        return self._failure or self._read_ahead.failure

    def keys(self, located: Located) -> list[str]:
        """The samples' keys in the shard set."""
        return [self.reader.key(s, i) for s, i in zip(located.shard, located.index, strict=True)]

    def close(self) -> None:
        self._closed.set()
        self._read_ahead.close()
        self._planner.join()
        del self._pipeline

    def _batches(self) -> Iterator[Located]:
        """This rank's micro batches, forever."""
        data, micro_batch = self.recipe.data, self.recipe.engine.micro_batch
        for step in itertools.count(self.step):
            positions = rank_positions(step, data.global_batch, self.rank, self.world_size, self.offset)
            for start in range(0, len(positions), micro_batch):
                yield self.stream.locate(positions[start : start + micro_batch])

    def _plan_ahead(self) -> None:
        try:
            for located, encoded in self._read_ahead:
                if not self._put(self._plan(located, encoded)):
                    return
        except Stopped:
            return
        except Exception as error:  # handed to the thread that asks for the batch
            self._failure = error
            self._put(error)

    def _put(self, item: Planned | Exception) -> bool:
        while not self._closed.is_set():
            try:
                self._planned.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _plan(self, located: Located, encoded: list[np.ndarray]) -> Planned:
        data, seed = self.recipe.data, self.recipe.seed
        sizes = np.array([self._size(located, row, image) for row, image in enumerate(encoded)])
        boxes = crop_boxes(seed, located.epoch, located.sample, sizes, data.crop_scale, data.crop_ratio)
        mirrored = flips(seed, located.epoch, located.sample) & data.flip
        noise = uniform(seed, Purpose.MASK, located.epoch, located.sample, self.noise_size)
        return Planned(located, encoded, boxes, mirrored, noise)

    def _size(self, located: Located, row: int, image: np.ndarray) -> tuple[int, int]:
        try:
            return jpeg_size(image.data)
        except ValueError as error:
            raise UserError(
                f"{self._sample(located, row)}: {error}; {self.reader.remedy(located.shard[row])}"
            ) from None

    def _build(self, threads: int) -> Pipeline:
        data = self.recipe.data
        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.recipe.engine.micro_batch,
            num_threads=threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=data.prefetch,
        )
        with pipeline:
            encoded, anchor, shape, mirror = fn.external_source(
                source=self._feed, num_outputs=4, batch=True, dtype=[types.UINT8] + 3 * [types.INT32]
            )
            images = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                axis_names="WH",
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo, and so Pillow, does on the CPU
                adjust_orientation=False,  # orientation is the shard builder's business
            )
            size = [data.image_size, data.image_size]
            images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in data.mean],
                std=[255 * value for value in data.std],
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _feed(self) -> tuple[list[np.ndarray], ...]:
        planned = self._planned.get()
        if isinstance(planned, Exception):
            raise planned
        self._in_flight.append(planned)
        boxes = planned.boxes.astype(np.int32)
        return planned.encoded, list(boxes[:, :2]), list(boxes[:, 2:]), list(planned.flips.astype(np.int32))

    def _blame(self, error: RuntimeError) -> UserError:
        """DALI says that a batch failed; find the samples that did by decoding them one by one."""
        planned = self._in_flight[0]
        for row, image in enumerate(planned.encoded):
            try:
                Image.open(io.BytesIO(image)).load()
            except (OSError, SyntaxError) as reason:
                name = self._sample(planned.located, row)
                remedy = self.reader.remedy(planned.located.shard[row])
                return UserError(f"{name}: this image cannot be decoded: {reason}; {remedy}")
        return UserError(f"DALI failed on {self._sample(planned.located, 0)} or a later sample: {error}")

    def _sample(self, located: Located, row: int) -> str:
        shard, index = located.shard[row], located.index[row]
        return f"{self.reader.name(shard)}, sample {self.reader.key(shard, index)!r}"
