"""engine.micro_batch: auto, which becomes a number when a run starts.

Invariant: the number is equal on all ranks. It divides a rank's share of the global batch, so it does not change what
is trained. recipe.yaml records it, and a run that resumes keeps it if it still divides the share and fits.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from pipeline.errors import UserError
from pipeline.recipe.loading import load
from pipeline.recipe.sections import is_auto
from pipeline.recipe.training import TrainingRecipe, choose_micro_batch
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)
AnyTrainingRecipe = TypeVar("AnyTrainingRecipe", bound=TrainingRecipe)
CPU_MICRO_BATCH = 16
"""Limit without a GPU: on a CPU, larger micro batches gain nothing."""


class MicroBatchLimits(NamedTuple):
    """Largest micro batches of a task on one GPU."""

    fitting: float
    """Images that the memory suffices for."""
    useful: float
    """Images beyond which a micro batch gains no speed."""

    @property
    def limit(self) -> float:
        return min(self)

    def __str__(self) -> str:
        return f"memory for {self.fitting:,.0f}, no speed to gain beyond {self.useful:,.0f}"


CPU_LIMITS = MicroBatchLimits(float("inf"), CPU_MICRO_BATCH)


def resolve_micro_batch(
    recipe: AnyTrainingRecipe,
    run: RunDirectory,
    world_size: int,
    memory_gib: float | None,
    get_limits: Callable[[float], MicroBatchLimits],
) -> AnyTrainingRecipe:
    """Return the recipe with a number instead of `auto`: what the run used before, else the largest in the limits.

    Args:
        memory_gib: Memory of each GPU; None on a CPU.
        get_limits: Returns the limits for this memory.

    Raises:
        UserError: If the global batch cannot be divided among the ranks.
    """
    if not is_auto(recipe.engine.micro_batch):
        return recipe
    share, unit = recipe.images_per_rank(world_size), recipe.micro_batch_unit
    limits = CPU_LIMITS if memory_gib is None else get_limits(memory_gib)
    number = _recorded(recipe, run)
    reason = f"as in {run.recipe_file}"
    if number is None or share % number or number % unit or number > limits.fitting:
        number = choose_micro_batch(share, unit, limits.limit)
        reason = "on a CPU" if memory_gib is None else str(limits)
    logger.info(f"engine.micro_batch: auto is {number} of a rank's {share} images per step ({reason})")
    return recipe.with_micro_batch(number)


def _recorded(recipe: TrainingRecipe, run: RunDirectory) -> int | None:
    """Return the number in the run's recipe.yaml, None if there is none."""
    try:
        if not run.recipe_file.is_file():
            return None
        number = load(type(recipe), run.recipe_file).engine.micro_batch
    except (UserError, OSError):  # `RunDirectory.check` reports it
        return None
    return None if is_auto(number) else number
