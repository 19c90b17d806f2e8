"""What a probe learns from: a rank's part of every global batch, as features and labels.

Invariant: step s takes the same samples from either feed, those of stream positions [s G, (s+1) G).
"""

from typing import NamedTuple

import torch

from pipeline.data.loader import Loader
from pipeline.data.order import rank_positions
from pipeline.data.reader import ShardReader
from pipeline.evals.features import Extractor
from pipeline.evals.probe_recipe import ProbeRecipe


class Fed(NamedTuple):
    """On the device."""

    features: torch.Tensor
    """(B, D) float32"""
    labels: torch.Tensor
    """(B,) int64"""


class RandomCrops:
    """Every image anew through the encoder, as a random resized crop; a micro batch at a time."""

    def __init__(self, recipe: ProbeRecipe, reader: ShardReader, extract: Extractor, step: int) -> None:
        world = extract.world
        place = world.device, world.rank, world.size, step, recipe.data.threads or world.cores
        self.extract = extract
        self.loader = Loader(reader, recipe, 0, *place, labelled=True)

    def next(self) -> Fed:
        batch = self.loader.next()
        return Fed(self.extract.batch_of(batch.images), batch.labels)

    @property
    def waited(self) -> float:
        """Seconds."""
        return self.loader.waited

    def close(self) -> None:
        self.loader.close()


class KeptFeatures:
    """Features that were extracted once; the rank's whole part of a step at a time."""

    waited = 0.0

    def __init__(self, recipe: ProbeRecipe, reader: ShardReader, extract: Extractor, step: int) -> None:
        self.features, self.step = extract(reader), step
        self.batch, self.world = recipe.data.global_batch, extract.world
        self.stream = reader.stream(recipe.seed)

    def next(self) -> Fed:
        positions = rank_positions(self.step, self.batch, self.world.rank, self.world.size)
        rows = torch.from_numpy(self.stream.locate(positions).sample)
        self.step += 1
        return Fed(*(tensor[rows].to(self.world.device) for tensor in self.features))

    def close(self) -> None:
        pass
