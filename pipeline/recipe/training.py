"""The common part of the recipes for pre-training and fine-tuning.

Invariant: the length of a run and the split of its batch depend only on the recipe, the number of samples and
the world size.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import Field

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
    is_auto,
)


def count_micro_batches(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Return the micro batches per rank and step.

    Raises:
        UserError: If the global batch is not a multiple of micro_batch x world_size.
    """
    per_forward = world_size * micro_batch
    steps, remainder = divmod(global_batch, per_forward)
    if remainder or not steps:
        raise UserError(
            f"data.global_batch: {global_batch} is not a multiple of engine.micro_batch x ranks = "
            f"{micro_batch} x {world_size} = {per_forward}; change one of the three"
        )
    return steps


def choose_micro_batch(share: int, unit: int, limit: float) -> int:
    """Return the largest divisor of `share` that is a multiple of `unit` and at most `limit`; if none is, the smallest.

    Raises:
        ValueError: If `share` is not a positive multiple of `unit`.
    """
    multiples, remainder = divmod(share, unit)
    if remainder or not multiples:
        raise ValueError(f"share: {share} is not a positive multiple of {unit}")
    divisors = [unit * number for number in range(1, multiples + 1) if multiples % number == 0]
    return max([divisor for divisor in divisors if divisor <= limit] or divisors[:1])


class TrainingRecipe(RecipeFile):
    """The sections that the trainer, the loader and the engine read."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weights, the sample order and all augmentation."""
    data: DataSection = DataSection()
    engine: EngineSection = EngineSection()
    optim: OptimSection = OptimSection()
    guard: GuardSection = GuardSection()
    train: TrainSection

    def _validate(self) -> None:
        data, engine = self.data, self.engine
        if not is_auto(engine.micro_batch) and engine.micro_batch % data.crops_per_image:
            raise ValueError(
                f"data.crops_per_image: {data.crops_per_image} does not divide engine.micro_batch, {engine.micro_batch}"
            )
        read_s = RetryPolicy(data.timeout_s, data.retries).max_total_s
        if read_s >= 60 * engine.timeout_minutes:
            raise ValueError(
                f"data.timeout_s, data.retries: a failing read takes {read_s:.0f} s; it must take less than "
                f"engine.timeout_minutes, {engine.timeout_minutes:g}"
            )

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, by MAE's linear scaling rule."""
        return self.optim.base_lr * self.data.global_batch / 256

    def resolve_sources(self, paths: Sequence[str]) -> tuple[Source, ...]:
        """Return the run's shard sets: the paths given by --data, or the recipe's data.sources.

        Raises:
            UserError: If both or neither are given, or if a path is empty or given twice.
        """
        if paths and self.data.sources:
            raise UserError(f"--data {paths[0]}, data.sources: both name shard sets; remove one of the two")
        if not all(paths):
            raise UserError("--data: is empty; give a shard set's directory or URL")
        if len(set(paths)) < len(paths):
            raise UserError(f"--data {max(paths, key=paths.count)}: is given twice")
        sources = self.data.sources or tuple(Source(path=path) for path in paths)
        if not sources:
            raise UserError("--data, data.sources: name a shard set by one of the two")
        return sources

    def total_steps(self, num_samples: int) -> int:
        """Return the run's number of steps on `num_samples` samples, rounded up."""
        return self.train.total_steps(num_samples, self.data.global_batch)

    def warmup_steps(self, num_samples: int) -> float:
        """Return the number of warm-up steps, which need not be whole, on `num_samples` samples."""
        if self.optim.warmup_epochs is not None:
            return self.optim.warmup_epochs * num_samples / self.data.global_batch
        return self.optim.warmup_steps or 0

    @property
    def micro_batch_unit(self) -> int:
        """engine.micro_batch must be a multiple of this."""
        return self.data.crops_per_image

    def images_per_rank(self, world_size: int) -> int:
        """Return a rank's share of the global batch.

        Raises:
            UserError: If the global batch is not a multiple of the ranks and of `micro_batch_unit`.
        """
        share, remainder = divmod(self.data.global_batch, world_size)
        if remainder or not share or share % self.micro_batch_unit:
            needed = f" x {self.micro_batch_unit}" if self.micro_batch_unit > 1 else ""
            raise UserError(
                f"data.global_batch: {self.data.global_batch} is not a multiple of the {world_size} ranks{needed}; "
                "change one of them"
            )
        return share

    def with_micro_batch(self, micro_batch: int) -> Self:
        """Return this recipe with another engine.micro_batch."""
        return self.model_copy(update={"engine": self.engine.model_copy(update={"micro_batch": micro_batch})})

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Return the micro batches per rank and step, unless engine.micro_batch is auto; see `count_micro_batches`."""
        return count_micro_batches(self.data.global_batch, self.engine.micro_batch, world_size)
