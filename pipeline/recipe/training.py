"""What every recipe that is trained has: data, engine, optimiser, guard and schedule.

Invariant: how long a run takes and how its batch is cut follow from the recipe, the number of samples and the
number of ranks alone.
"""

import math
from collections.abc import Sequence

from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.recipe.loading import RecipeFile
from pipeline.recipe.sections import (
    DataSection,
    EngineSection,
    GuardSection,
    OptimSection,
    RetryPolicy,
    Source,
    TrainSection,
)


class TrainingRecipe(RecipeFile):
    """The sections that the loop, the loader and the engine read."""

    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection = DataSection()
    engine: EngineSection = EngineSection()
    optim: OptimSection = OptimSection()
    guard: GuardSection = GuardSection()
    train: TrainSection

    @model_validator(mode="after")
    def _validate_training(self) -> "TrainingRecipe":
        if self.engine.micro_batch % self.data.crops_per_image:
            raise ValueError(
                f"data.crops_per_image: {self.data.crops_per_image} does not divide engine.micro_batch, "
                f"{self.engine.micro_batch}"
            )
        read = RetryPolicy(self.data.timeout_s, self.data.retries).max_total_s
        if read >= 60 * self.engine.timeout_minutes:
            raise ValueError(
                f"data.timeout_s, data.retries: a read may take {read:.0f} s before it has failed; "
                f"engine.timeout_minutes, {self.engine.timeout_minutes:g}, must be longer"
            )
        return self

    @property
    def lr(self) -> float:
        """Peak learning rate, by MAE's linear scaling rule."""
        return self.optim.base_lr * self.data.global_batch / 256

    def sources(self, given: Sequence[str]) -> tuple[Source, ...]:
        """The shard sets of a run: those that --data names, or the recipe's. UserError unless one does."""
        if given and self.data.sources:
            raise UserError(
                f"--data {given[0]}, data.sources: both name shard sets; leave one of the two out"
            )
        if not all(given):
            raise UserError("--data: is empty; give a shard set's directory or URL")
        if len(set(given)) < len(given):
            raise UserError(f"--data {max(given, key=given.count)}: stands there twice")
        sources = self.data.sources or tuple(Source(path=path) for path in given)
        if not sources:
            raise UserError("--data, data.sources: name a shard set by one of the two")
        return sources

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole run on a set of `num_samples`. An epoch need not be a whole number of steps."""
        if self.train.steps is not None:
            return self.train.steps
        return math.ceil(self.train.epochs * num_samples / self.data.global_batch)

    def warmup_steps(self, num_samples: int) -> float:
        """Steps over which the learning rate rises, on a set of `num_samples`."""
        if self.optim.warmup_epochs is not None:
            return self.optim.warmup_epochs * num_samples / self.data.global_batch
        return self.optim.warmup_steps or 0

    def accumulation(self, world_size: int) -> int:
        """Micro batches that a rank takes for a step. UserError where there is a remainder."""
        share = world_size * self.engine.micro_batch
        steps, rest = divmod(self.data.global_batch, share)
        if rest or not steps:
            raise UserError(
                f"data.global_batch: {self.data.global_batch} is no multiple of engine.micro_batch x ranks "
                f"= {self.engine.micro_batch} x {world_size} = {share}; change one of the three"
            )
        return steps
