"""A rank's part of every global batch of the linear probe, as features and labels.

Invariant: step s takes the same samples from either source: stream positions [s G, (s+1) G).
"""

from typing import NamedTuple

import torch

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import rank_positions
from pipeline.data.transfer import copy_to_device
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.recipe.linear_probe import ProbeRecipe


class FeatureBatch(NamedTuple):
    """On the device."""

    features: torch.Tensor
    """(B, D) float32."""
    labels: torch.Tensor
    """(B,) int64."""


class RandomCropFeatures:
    """Encodes a new random resized crop of every image; returns one micro batch at a time."""

    def __init__(self, recipe: ProbeRecipe, reader: ShardReader, extract: FeatureExtractor, step: int) -> None:
        dist_info = extract.dist_info
        self.extract = extract
        place = dist_info.device, dist_info.rank, dist_info.world_size, step
        threads = recipe.data.decode_threads or dist_info.num_cpus
        # The loader reads only sections that both kinds of recipe have.
        self.loader = Loader(reader, recipe, 0, *place, threads, labeled=True)  # pyright: ignore[reportArgumentType]

    def next(self) -> FeatureBatch:
        batch = self.loader.next()
        assert batch.labels is not None
        return FeatureBatch(self.extract.encode(batch.images), batch.labels)

    @property
    def wait_s(self) -> float:
        """Total time that `next` waited for data, in seconds."""
        return self.loader.wait_s

    def close(self) -> None:
        self.loader.close()


class CachedFeatures:
    """Serves features of center crops, extracted once; returns the rank's whole part of a step at a time."""

    wait_s = 0.0

    def __init__(self, recipe: ProbeRecipe, reader: ShardReader, extract: FeatureExtractor, step: int) -> None:
        self.features, self.step = extract(reader), step
        self.global_batch, self.dist_info = recipe.data.global_batch, extract.dist_info
        self.sampler = reader.sampler(recipe.seed)

    def next(self) -> FeatureBatch:
        rank, world_size = self.dist_info.rank, self.dist_info.world_size
        positions = rank_positions(self.step, self.global_batch, rank, world_size)
        rows = torch.from_numpy(self.sampler.locate(positions).sample_id)
        self.step += 1
        return FeatureBatch(*(copy_to_device(tensor[rows], self.dist_info.device) for tensor in self.features))

    def close(self) -> None:
        pass
