"""Rollback to an earlier checkpoint, after which training continues with later data.

Invariant: what a run does after a rollback is a function of the checkpoint it rolled back to. The rollback is written
into that checkpoint's state.json, and later checkpoints are deleted, before anything is trained. So a run that is
killed during or after a rollback and resumed ends with the same weights.
"""

import logging
from pathlib import Path

import numpy as np

from pipeline.data.loader import Loader
from pipeline.distributed.collectives import all_gather_object, broadcast_object, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.train import checkpoint
from pipeline.train.guard import BadSpan, Guard
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def rollback(
    run: RunDirectory, bad_span: BadSpan, guard: Guard, global_batch: int, every: int, dist_info: DistInfo
) -> Path:
    """Choose the checkpoint to resume from, write the rollback into it, and delete later ones. Collective.

    Args:
        every: The present train.checkpoint_every.

    Returns:
        The checkpoint.

    Raises:
        Diverged: If there is no checkpoint to roll back to, or there were too many rollbacks.
        AllRanksError: If the checkpoint was deleted meanwhile.
    """
    directory = run.checkpoints
    # Checkpoints that a signal made are no targets: the target must not depend on interruptions.
    scheduled = raise_on_all_ranks(
        lambda: checkpoint.scheduled_checkpoint_steps(directory, every) if dist_info.rank == 0 else []
    )
    saved = [step for step in broadcast_object(scheduled) if step < bad_span.first_step]
    target, consecutive = guard.rollback_target(bad_span, saved)
    logger.warning(
        f"too many consecutive skipped steps ({bad_span.first_step}-{bad_span.last_step}); rolling back to step "
        f"{target}, resuming after step {bad_span.last_step}'s data"
    )
    path = checkpoint.latest_valid_checkpoint(directory, dist_info.rank, dist_info.world_size, at_most=target)
    if path is None:
        raise AllRanksError(
            f"{directory}: the checkpoint of step {target} was deleted during the rollback; run the same command again"
        )
    state = checkpoint.read_state(path)
    raise_on_all_ranks(lambda: checkpoint.delete_after(directory, state["step"]) if dist_info.rank == 0 else None)
    all_gather_object(None)  # every rank has read the state before rank 0 changes it
    new_state = guard.state_after_rollback(bad_span, state["step"], consecutive, state["guard"], global_batch)
    raise_on_all_ranks(
        lambda: checkpoint.update_state_file(path, {"guard": new_state}) if dist_info.rank == 0 else None
    )
    return path


def write_bad_samples(
    run: RunDirectory, bad_span: BadSpan, loader: Loader, offset: int, global_batch: int, rank: int
) -> None:
    """Append the samples of the bad span to offending-samples.txt: "<step> <sample key>" per line. Collective.

    Args:
        offset: Stream positions that earlier rollbacks skipped.
    """

    def write() -> None:
        with open(run.bad_samples, "a") as file:
            for step in range(bad_span.first_step, bad_span.last_step + 1):
                positions = offset + (step - 1) * global_batch + np.arange(global_batch)
                images = np.unique(positions // loader.recipe.data.crops_per_image)
                keys = loader.keys(loader.sampler.locate(images))
                file.write("".join(f"{step} {key}\n" for key in keys))

    raise_on_all_ranks(lambda: write() if rank == 0 else None)
