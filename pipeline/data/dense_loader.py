"""Loaders of images with annotations of their parts: for detection and segmentation.

Invariant: those of `loader` and `eval_loader`. A `DenseTransform` reads the annotations and places them and the
images on the canvas; threads do this in advance, so that the device does not wait.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.dali import PipelineDef, placed_pipeline_def
from pipeline.data.decode_options import decode_options
from pipeline.data.dense_batch import DenseBatchBuilder, DenseBatchSpec, TargetBuilder
from pipeline.data.eval_loader import EvalLoader
from pipeline.data.loader import Batch, BatchBuilder, Loader
from pipeline.data.placement import DenseTransform, Placement, Target, to_device
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation
from pipeline.data.transfer import pin_for
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe.sections import DataSection


class DenseLoader(Loader):
    """Loads this rank's micro batches with targets, endlessly. The other arguments are those of `Loader`."""

    def __init__(self, reader: ShardReader, transform: DenseTransform, *arguments: Any, **options: Any):
        self.annotation, self._transform = transform.extension, transform
        super().__init__(reader, *arguments, **options)

    def close(self) -> None:
        super().close()
        self._target_builder.close()

    def _make_builder(self, noise_size: int, undecodable: UndecodableSamples, labeled: bool) -> BatchBuilder:
        threads, pinned = self.recipe.data.read_threads, self.device.type == "cuda"
        self._target_builder = TargetBuilder(self.reader, self._transform, threads, pinned)
        pin = partial(pin_for, device=self.device)
        return DenseBatchBuilder(self.reader, self.recipe, noise_size, undecodable, self._target_builder, pin)

    def _pipeline_def(self, deterministic: bool) -> PipelineDef:
        return placed_pipeline_def(self.recipe.data, decode_options(self.recipe.data, self.device, deterministic))

    def _make_batch(self, spec: DenseBatchSpec, images: torch.Tensor) -> Batch:
        noise = spec.noise.to(self.device, non_blocking=True)
        replaced = int((spec.indexes != spec.locations.index_in_shard).sum())
        return Batch(images, noise, None, spec.locations, replaced, to_device(spec.targets, self.device))


class DenseEvalBatch(NamedTuple):
    """A batch of B images on the device, padded at the right and at the bottom to the same size."""

    images: torch.Tensor
    """(B, 3, H, W) float32, normalized."""
    placements: list[Placement]
    targets: list[Target]
    """On the host."""
    sample_ids: np.ndarray
    """(B,) int64 positions in the shard set."""


class DenseEvalLoader(EvalLoader):
    """Iterates over a rank's part of a shard set, in `DenseEvalBatch`es; can be iterated repeatedly.

    The transform is called with epoch 0. The other arguments are those of `EvalLoader`.
    """

    def __init__(self, reader: ShardReader, transform: DenseTransform, data: DataSection, *arguments: Any):
        super().__init__(reader, data, *arguments, resize=data.image_size)
        self._target_builder = TargetBuilder(reader, transform, self.threads, pinned=False)

    def _pipeline_def(self) -> PipelineDef:
        return placed_pipeline_def(self.data, decode_options(self.data, self.device, self.deterministic))

    def _make_spec(self, locations: SampleLocation, encoded: list[np.ndarray], sizes: np.ndarray) -> DenseBatchSpec:
        annotations = self._read_all(locations, self._target_builder.transform.extension)
        indexes = locations.index_in_shard
        placed = self._target_builder.build(locations, indexes, annotations, [(int(w), int(h)) for w, h in sizes])
        return DenseBatchSpec(locations, indexes, encoded, *placed, torch.empty(len(encoded), 0))

    def _make_batch(self, spec: DenseBatchSpec, images: torch.Tensor) -> DenseEvalBatch:
        return DenseEvalBatch(images, spec.placements, spec.targets, spec.locations.sample_id)
