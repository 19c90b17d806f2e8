"""Loader for evaluation: resize the shorter side, center crop, each sample exactly once.

Invariant: samples come in the order of the shard set. The ranks read consecutive, disjoint parts that differ
by at most one batch; no sample is repeated to fill a batch. Batches do not depend on the world size, so neither
do a model's outputs. Pixels match torchvision's Resize (bicubic, antialiased) and CenterCrop on a Pillow image
with a mean absolute difference below 0.5 of 255 levels. Undecodable images are not substituted; one ends the
evaluation.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from pipeline.data.dali import Inputs, PipelineDef, eval_pipeline_def
from pipeline.data.decode_options import decode_options, prefetch_depth
from pipeline.data.decoder import ImageDecoder
from pipeline.data.pixels import jpeg_size
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation
from pipeline.data.transfer import pin_for
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection


class EvalBatch(NamedTuple):
    """A batch of B images on the device."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalized."""
    labels: torch.Tensor | None
    """(B,) int64 indexes of the manifest's `classes`; None if the set has no labels."""
    sample_ids: np.ndarray
    """(B,) int64 positions in the shard set."""


class EvalBatchSpec(NamedTuple):
    """A batch of n images before decoding."""

    locations: SampleLocation
    labels: torch.Tensor | None
    """(n,) on the host, pinned if the device is a GPU."""
    encoded: list[np.ndarray]
    sizes: np.ndarray
    """(n, 2): height and width after the resize."""
    corners: np.ndarray
    """(n, 2): x and y of the crop in the resized image."""

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        """Return the inputs of `eval_pipeline_def` for these images."""
        return self.encoded[rows], self.sizes[rows], self.corners[rows]


class EvalLoader:
    """Iterates over a rank's part of a shard set, in `EvalBatch`es; can be iterated repeatedly.

    Args:
        reader: of a single shard set; several would each have their own classes.
        data: image size, mean, standard deviation and prefetch.
        batch: images in a batch; the last one may have fewer.
        threads: decoding threads.
        resize: pixels of the shorter side, at least the image size.
        samples: number of samples from the start of the set; None: all.
        deterministic: on a GPU, decode an image to the same pixels whatever its batch is; see `decode_options`.
    """

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
        deterministic: bool = False,
    ):
        if resize < data.image_size:
            raise ValueError(f"resize: {resize} px is less than the image size, {data.image_size}")
        self.has_labels = reader.manifest.has_labels
        self._labels: dict[int, np.ndarray] = {}  # by shard
        self.reader, self.data, self.batch, self.device = reader, data, batch, device
        self.threads, self.resize, self.deterministic = threads, resize, deterministic
        samples = min(samples or reader.num_samples, reader.num_samples)
        batches = -(-samples // batch)
        self.first, self.end = (min(samples, batch * (batches * part // world_size)) for part in (rank, rank + 1))

    def __len__(self) -> int:
        """Return the number of samples, not batches, of this rank."""
        return self.end - self.first

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            UserError: If a sample cannot be read or decoded, or the device has not enough memory.
            DeviceError: If the device failed.
        """
        depth = prefetch_depth(self.data, self.device)
        specs = PrefetchThread(self._build_batches(), depth)
        decoder = ImageDecoder(self._pipeline_def(), specs, self._replace, self.batch, self.device, self.threads, depth)
        try:
            for _ in range(self.first, self.end, self.batch):
                yield self._make_batch(*decoder.next())
        finally:
            decoder.close()
            specs.close()

    def _build_batches(self) -> Iterator[Any]:
        ends = np.cumsum(self.reader.shard_sizes)
        starts = ends - self.reader.shard_sizes
        for start in range(self.first, self.end, self.batch):
            sample_id = np.arange(start, min(start + self.batch, self.end))
            shard = np.searchsorted(ends, sample_id, side="right")
            locations = SampleLocation(np.zeros_like(sample_id), shard, sample_id - starts[shard], sample_id)
            encoded = self._read_all(locations)
            sizes = np.array([self._size(locations, row, image) for row, image in enumerate(encoded)])
            yield self._make_spec(locations, encoded, sizes)

    def _pipeline_def(self) -> PipelineDef:
        return eval_pipeline_def(self.data, decode_options(self.data, self.device, self.deterministic))

    def _make_spec(self, locations: SampleLocation, encoded: list[np.ndarray], sizes: np.ndarray) -> Any:
        """Return what the decoder needs for a batch of images with these sizes (n, 2), width and height."""
        labels = []
        for number in np.unique(locations.shard).tolist() if self.has_labels else ():
            if number not in self._labels:
                self._labels = {number: self.reader.labels(number)}  # of the last shard only
            labels.append(self._labels[number][locations.index_in_shard[locations.shard == number]])
        geometry = resize_and_crop_geometry(sizes, self.resize, self.data.image_size)
        host_labels = pin_for(torch.from_numpy(np.concatenate(labels)), self.device) if labels else None
        return EvalBatchSpec(locations, host_labels, encoded, *geometry)

    def _make_batch(self, spec: Any, images: torch.Tensor) -> Any:
        labels = spec.labels
        if labels is not None:
            labels = labels.to(self.device, non_blocking=True)
        return EvalBatch(images, labels, spec.locations.sample_id)

    def _read_all(self, locations: SampleLocation, extension: str = "jpg") -> list[np.ndarray]:
        """Return files of the samples, which are in the order of the shards."""
        files = []
        for number in np.unique(locations.shard).tolist():
            indexes = locations.index_in_shard[locations.shard == number]
            files += self.reader.read_many(number, indexes.tolist(), extension)
        return files

    def _size(self, locations: SampleLocation, row: int, image: np.ndarray) -> tuple[int, int]:
        try:
            return jpeg_size(image)
        except ValueError as error:
            raise self._undecodable_error(locations, row, str(error)) from error

    def _replace(self, spec: Any, row: int, reason: str) -> NoReturn:
        raise self._undecodable_error(spec.locations, row, reason)

    def _undecodable_error(self, locations: SampleLocation, row: int, reason: str) -> UserError:
        shard, index = int(locations.shard[row]), int(locations.index_in_shard[row])
        return UserError(
            f"{self.reader.shard_path(shard)}, sample {self.reader.key(shard, index)!r}: cannot be decoded: "
            f"{reason}; {self.reader.repair_hint(shard)}"
        )


def resize_and_crop_geometry(sizes: np.ndarray, resize: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute torchvision's Resize(resize) and CenterCrop(crop) for `sizes` (n, 2), width and height.

    Returns:
        (height, width) after the resize, and (x, y) of the crop in the resized image, int32 (n, 2) each.
    """
    short = sizes.min(axis=1, keepdims=True)
    resized = (resize * sizes / short).astype(np.int64)  # rounded down, as in torchvision
    corners = np.rint((resized - crop) / 2)  # half to even, as Python's round
    return resized[:, ::-1].astype(np.int32), corners.astype(np.int32)
