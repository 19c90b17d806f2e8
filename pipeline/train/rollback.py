"""Going back to an earlier checkpoint, and on from there with other data.

Invariant: what a run does after a return follows from the checkpoint it went back to: its state.json is
amended by the return before anything is trained, and the checkpoints after it are gone. So a run that is
killed during or after a return, and started again, comes to the same weights.
"""

import sys
from pathlib import Path

import numpy as np

from pipeline.data.loader import Loader
from pipeline.distributed.collectives import all_gather_object, broadcast_object, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.train import checkpoint
from pipeline.train.guard import BadSpan, Guard

SAMPLES = "offending-samples.txt"


def rollback(
    run: Path, bad_span: BadSpan, guard: Guard, global_batch: int, every: int, dist_info: DistInfo
) -> Path:
    """The checkpoint to continue from, amended; every rank calls it. Raises Diverged where there is none."""
    checkpoints = run / "checkpoints"
    # Those that a signal made don't count: where to go back must not depend on interruptions.
    scheduled = raise_on_all_ranks(
        lambda: checkpoint.scheduled_steps(checkpoints, every) if dist_info.rank == 0 else None
    )
    saved = [step for step in broadcast_object(scheduled) if step < bad_span.first]
    back, in_a_row = guard.rollback_target(bad_span, saved)
    if dist_info.rank == 0:
        print(
            f"steps {bad_span.first} to {bad_span.last} were skipped, too many in a row: back to step {back}, "
            f"and on with the data after step {bad_span.last}",
            file=sys.stderr,
        )
    found = checkpoint.latest_valid_checkpoint(
        checkpoints, dist_info.rank, dist_info.world_size, at_most=back
    )
    state = checkpoint.read_state(found)
    raise_on_all_ranks(
        lambda: checkpoint.delete_after(checkpoints, state["step"]) if dist_info.rank == 0 else None
    )
    all_gather_object("read")
    changed = guard.state_after_rollback(bad_span, state["step"], in_a_row, state["guard"], global_batch)
    raise_on_all_ranks(
        lambda: checkpoint.update_state(found, {"guard": changed}) if dist_info.rank == 0 else None
    )
    return found


def write_offending_samples(
    run: Path, bad_span: BadSpan, loader: Loader, offset: int, global_batch: int, dist_info: DistInfo
) -> None:
    """Append the keys of the trouble's samples to offending-samples.txt: "<step> <sample key>" a line. Every
    rank calls it."""

    def write() -> None:
        with open(run / SAMPLES, "a") as file:
            for step in range(bad_span.first, bad_span.last + 1):
                positions = offset + (step - 1) * global_batch + np.arange(global_batch)
                images = np.unique(positions // loader.recipe.data.crops_per_image)
                keys = loader.keys(loader.stream.locate(images))
                file.write("".join(f"{step} {key}\n" for key in keys))

    raise_on_all_ranks(lambda: write() if dist_info.rank == 0 else None)
