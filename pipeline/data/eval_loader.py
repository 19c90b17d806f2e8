"""Images as evaluation sees them: shorter side resized, centre cropped, each sample exactly once.

Invariant: the samples come in the order of the shard set, and the ranks have consecutive, disjoint parts of
it that differ by at most one batch; no sample is repeated to fill one. Which samples share a batch does not
depend on the number of ranks, so neither does what a model makes of them. The pixels are torchvision's, of
Resize (bicubic, antialiased) and CenterCrop on a Pillow image, to less than half a level of 255 on average.
Nothing stands in for an image that cannot be decoded: a figure is of all samples or there is none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.dali import Decoder, eval_pipeline_def
from pipeline.data.jpeg import jpeg_size
from pipeline.data.loader import prefetch_depth
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection


class EvalBatch(NamedTuple):
    """Some samples, on the device."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalised."""
    labels: torch.Tensor | None
    """(B,) int64, positions in the manifest's `classes`; None where the shard set has no labels."""
    samples: np.ndarray
    """(B,) int64, positions in the shard set."""


class EvalBatchSpec(NamedTuple):
    """A batch before decoding."""

    locations: SampleLocation
    labels: np.ndarray | None
    encoded: list[np.ndarray]
    sizes: np.ndarray
    """(n, 2): height and width that each image is resized to."""
    corners: np.ndarray
    """(n, 2): x and y of the square that is cut out of it."""

    def inputs(self, rows: slice = slice(None)) -> tuple:
        """For `dali.evaluation_graph`."""
        return self.encoded[rows], self.sizes[rows], self.corners[rows]


class EvalLoader:
    """Iterates over a rank's part of a shard set; each iteration begins anew."""

    def __init__(
        self,
        reader: ShardReader,
        data: DataSection,
        batch: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        resize: int = 256,
        samples: int | None = None,
    ):
        """data: image size, mean, standard deviation and prefetch; resize: pixels of the shorter side, at
        least the image size; samples: so many, the first of the set; None: all. UserError where there are
        several shard sets: classes are a single set's."""
        if resize < data.image_size:
            raise ValueError(f"a shorter side of {resize} px holds no square of {data.image_size}")
        self.classes = reader.manifest.classes
        self.reader, self.data, self.batch, self.device = reader, data, batch, device
        self.threads, self.resize = threads, resize
        samples = min(samples or reader.num_samples, reader.num_samples)
        batches = -(-samples // batch)
        self.first, self.end = (
            min(samples, batch * (batches * part // world_size)) for part in (rank, rank + 1)
        )

    def __len__(self) -> int:
        """Samples of this rank."""
        return self.end - self.first

    def __iter__(self) -> Iterator[EvalBatch]:
        """Batches of `batch` samples, the last one of what is left. UserError where a sample cannot be read
        or decoded."""
        prefetch = prefetch_depth(self.data, self.device)
        ahead = PrefetchThread(self._plan(), prefetch)
        pipeline_def = eval_pipeline_def(self.data, self.device.type == "cuda")
        decoder = Decoder(pipeline_def, ahead, self._blame, self.batch, self.device, self.threads, prefetch)
        try:
            for _ in range(self.first, self.end, self.batch):
                try:
                    spec, images = decoder.next()
                except StopIteration:
                    raise ahead.failure from None
                labels = spec.labels
                if labels is not None:
                    labels = torch.from_numpy(labels).to(self.device, non_blocking=True)
                yield EvalBatch(images, labels, spec.locations.sample)
        finally:
            decoder.close()
            ahead.close()

    def _plan(self) -> Iterator[EvalBatchSpec]:
        ends = np.cumsum(self.reader.shard_sizes)
        starts = ends - self.reader.shard_sizes
        labels: dict[int, np.ndarray] = {}
        for start in range(self.first, self.end, self.batch):
            sample = np.arange(start, min(start + self.batch, self.end))
            shard = np.searchsorted(ends, sample, side="right")
            locations = SampleLocation(np.zeros_like(sample), shard, sample - starts[shard], sample)
            encoded, found = [], []
            for number in np.unique(shard).tolist():
                indexes = locations.index[shard == number]
                encoded += self.reader.read_many(number, indexes.tolist())
                if self.classes:
                    if number not in labels:
                        labels = {number: self.reader.labels(number)}
                    found.append(labels[number][indexes])
            sizes = np.array([self._size(locations, row, image) for row, image in enumerate(encoded)])
            yield EvalBatchSpec(
                locations,
                np.concatenate(found) if self.classes else None,
                encoded,
                *resized_and_cropped(sizes, self.resize, self.data.image_size),
            )

    def _size(self, locations: SampleLocation, row: int, image: np.ndarray) -> tuple[int, int]:
        try:
            return jpeg_size(image.data)
        except ValueError as error:
            raise self._undecodable(locations, row, str(error)) from None

    def _blame(self, spec: EvalBatchSpec, row: int, reason: str) -> EvalBatchSpec:
        raise self._undecodable(spec.locations, row, reason)

    def _undecodable(self, locations: SampleLocation, row: int, reason: str) -> UserError:
        shard, index = int(locations.shard[row]), int(locations.index[row])
        return UserError(
            f"{self.reader.name(shard)}, sample {self.reader.key(shard, index)!r}: cannot be decoded: "
            f"{reason}; {self.reader.repair_hint(shard)}"
        )


def resized_and_cropped(sizes: np.ndarray, resize: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(resize) and CenterCrop(crop) for images of `sizes` (n, 2), width and height: the
    (height, width) after the resize and the crop's (x, y) in it, int32 (n, 2) each."""
    short = sizes.min(axis=1, keepdims=True)
    resized = (resize * sizes / short).astype(np.int64)  # rounded down, as there
    corners = np.rint((resized - crop) / 2)  # halves to even, as Python's round
    return resized[:, ::-1].astype(np.int32), corners.astype(np.int32)
