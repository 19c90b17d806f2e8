"""Batches of images and annotations before decoding: for detection and segmentation.

Invariant: placement and target of a sample are functions of its annotation, its image size and (epoch, sample)
alone. An undecodable image is substituted together with its annotation.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from pipeline.data.dali import Inputs
from pipeline.data.loader import BatchBuilder
from pipeline.data.philox import Purpose, uniform
from pipeline.data.pixels import limit_torch_to_calling_thread
from pipeline.data.placement import DenseTransform, Placement, Target, pin
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import SampleLocation
from pipeline.data.undecodable import UndecodableSamples
from pipeline.errors import UserError
from pipeline.recipe.training import TrainingRecipe


class DenseBatchSpec(NamedTuple):
    """A batch of n images before decoding."""

    locations: SampleLocation
    """(n,) the samples at these stream positions."""
    indexes: np.ndarray
    """(n,) index in the shard of the decoded samples: those of `locations` or their substitutes."""
    encoded: list[np.ndarray]
    placements: list[Placement]
    targets: list[Target]
    noise: torch.Tensor
    """(n, noise_size) on the host, pinned if the device is a GPU."""

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        """Return the inputs of `placed_pipeline_def` for these images."""
        placements = self.placements[rows]
        width, height = np.max([p.canvas if all(p.canvas) else p.extent for p in self.placements], axis=0)
        values = (
            [p.flip for p in placements],
            [p.size[::-1] for p in placements],
            [p.corner for p in placements],
            [p.extent for p in placements],
            [(height, width)] * len(placements),
        )
        return self.encoded[rows], *(np.array(value, np.int32) for value in values)


class TargetBuilder:
    """Builds the placements and targets of samples from their annotations, by a transform, in threads.

    Args:
        pinned: Whether targets are in page-locked memory.
    """

    def __init__(self, reader: ShardReader, transform: DenseTransform, threads: int, pinned: bool):
        self.reader, self.transform, self.pinned = reader, transform, pinned
        self._pool = ThreadPoolExecutor(threads, initializer=limit_torch_to_calling_thread)

    def build(
        self,
        locations: SampleLocation,
        indexes: np.ndarray,
        annotations: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Placement], list[Target]]:
        """Return placements and targets of samples.

        Args:
            locations: Give epoch and sample id, the keys of random numbers.
            indexes: (n,) index in the shard.
            annotations: Content of the samples' files.
            sizes: Width and height of the images.

        Raises:
            UserError: If an annotation is damaged or does not belong to its image.
        """

        def build_one(row: int) -> tuple[Placement, Target]:
            keys = int(locations.epoch[row]), int(locations.sample_id[row])
            try:
                placement, target = self.transform(annotations[row], sizes[row], *keys)
            except ValueError as error:
                self._raise(int(locations.shard[row]), int(indexes[row]), error)
            return placement, pin(target) if self.pinned else target

        pairs = list(self._pool.map(build_one, range(len(indexes))))
        return [placement for placement, _ in pairs], [target for _, target in pairs]

    def read(self, shard: int, index: int) -> np.ndarray:
        """Return the annotation of one sample, uint8 (bytes,)."""
        return self.reader.read_many(shard, [index], self.transform.extension)[0]

    def close(self) -> None:
        self._pool.shutdown()

    def _raise(self, shard: int, index: int, error: ValueError) -> NoReturn:
        raise UserError(
            f"{self.reader.shard_path(shard)}, sample {self.reader.key(shard, index)!r}: {error}; "
            "build the shard set again"
        ) from error


class DenseBatchBuilder(BatchBuilder):
    """Builds the batches of `DenseLoader`, and substitutes undecodable samples."""

    def __init__(
        self,
        reader: ShardReader,
        recipe: TrainingRecipe,
        noise_size: int,
        undecodable: UndecodableSamples,
        target_builder: TargetBuilder,
        pin: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ):
        super().__init__(reader, recipe, noise_size, undecodable, pin=pin)
        self.target_builder = target_builder

    def build(
        self, locations: SampleLocation, encoded: list[np.ndarray], annotations: Sequence[np.ndarray] = ()
    ) -> Any:
        """Build a micro batch from samples, their encoded images and their annotations."""
        indexes, encoded, sizes = self._substitute_unreadable(locations, encoded)
        annotations = list(annotations)
        for row in np.flatnonzero(indexes != locations.index_in_shard).tolist():
            annotations[row] = self.target_builder.read(int(locations.shard[row]), int(indexes[row]))
        noise = uniform(self.recipe.seed, Purpose.MASK, locations.epoch, locations.sample_id, self.noise_size)
        placed = self.target_builder.build(locations, indexes, annotations, [(int(w), int(h)) for w, h in sizes])
        return DenseBatchSpec(locations, indexes, encoded, *placed, self._pin(torch.from_numpy(noise)))

    def replace(self, spec: Any, row: int, reason: str) -> Any:
        """Substitute the image in a row, which DALI cannot decode, and its annotation."""
        shard, index = int(spec.locations.shard[row]), int(spec.indexes[row])
        self.undecodable.add(shard, index, reason, confirmed=False)
        index = self.undecodable.substitute(shard, index)
        index, image, size = self._first_readable(shard, index, self.reader.read(shard, index))
        location = SampleLocation(*(field[row : row + 1] for field in spec.locations))
        placed = self.target_builder.build(
            location, np.array([index]), [self.target_builder.read(shard, index)], [size]
        )
        indexes = spec.indexes.copy()
        indexes[row] = index
        encoded, placements, targets = list(spec.encoded), list(spec.placements), list(spec.targets)
        (placements[row],), (targets[row],) = placed
        encoded[row] = image
        return DenseBatchSpec(spec.locations, indexes, encoded, placements, targets, spec.noise)
