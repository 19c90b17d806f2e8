"""What a probe learns from: a rank's part of every global batch, as features and labels.

Invariant: step s takes the same samples from either feed, those of stream positions [s G, (s+1) G).
"""

from typing import NamedTuple

import torch

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import rank_positions
from pipeline.evals.feature_cache import FeatureExtractor
from pipeline.recipe.linear_probe import ProbeRecipe


class FeatureBatch(NamedTuple):
    """On the device."""

    features: torch.Tensor
    """(B, D) float32"""
    labels: torch.Tensor
    """(B,) int64"""


class RandomCropFeatures:
    """Every image anew through the encoder, as a random resized crop; a micro batch at a time."""

    def __init__(
        self, recipe: ProbeRecipe, reader: ShardReader, extract: FeatureExtractor, step: int
    ) -> None:
        dist_info = extract.dist_info
        place = (
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            step,
            recipe.data.decode_threads or dist_info.num_cpus,
        )
        self.extract = extract
        self.loader = Loader(reader, recipe, 0, *place, labelled=True)

    def next(self) -> FeatureBatch:
        batch = self.loader.next()
        return FeatureBatch(self.extract.batch_of(batch.images), batch.labels)

    @property
    def waited(self) -> float:
        """Seconds."""
        return self.loader.waited

    def close(self) -> None:
        self.loader.close()


class CachedFeatures:
    """Features that were extracted once; the rank's whole part of a step at a time."""

    waited = 0.0

    def __init__(
        self, recipe: ProbeRecipe, reader: ShardReader, extract: FeatureExtractor, step: int
    ) -> None:
        self.features, self.step = extract(reader), step
        self.batch, self.dist_info = recipe.data.global_batch, extract.dist_info
        self.stream = reader.stream(recipe.seed)

    def next(self) -> FeatureBatch:
        positions = rank_positions(self.step, self.batch, self.dist_info.rank, self.dist_info.world_size)
        rows = torch.from_numpy(self.stream.locate(positions).sample)
        self.step += 1
        return FeatureBatch(*(tensor[rows].to(self.dist_info.device) for tensor in self.features))

    def close(self) -> None:
        pass
