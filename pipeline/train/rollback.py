"""Going back to an earlier checkpoint, and on from there with other data.

Invariant: what a run does after a return follows from the checkpoint it went back to: its state.json is
amended by the return before anything is trained, and the checkpoints after it are gone. So a run that is
killed during or after a return, and started again, comes to the same weights.
"""

import sys
from pathlib import Path

import numpy as np

from pipeline.data.loader import Loader
from pipeline.train import checkpoint
from pipeline.train.distributed import World, agreed, from_rank_0, gathered
from pipeline.train.guard import Guard, Trouble

SAMPLES = "offending-samples.txt"


def retreat(run: Path, trouble: Trouble, guard: Guard, global_batch: int, every: int, world: World) -> Path:
    """The checkpoint to continue from, amended; every rank calls it. Raises Diverged where there is none."""
    checkpoints = run / "checkpoints"
    # Those that a signal made don't count: where to go back must not depend on interruptions.
    scheduled = agreed(lambda: checkpoint.scheduled_of(checkpoints, every) if world.rank == 0 else None)
    saved = [step for step in from_rank_0(scheduled) if step < trouble.first]
    back, in_a_row = guard.way_back(trouble, saved)
    if world.rank == 0:
        print(
            f"steps {trouble.first} to {trouble.last} were skipped, too many in a row: back to step {back}, "
            f"and on with the data after step {trouble.last}",
            file=sys.stderr,
        )
    found = checkpoint.newest_whole(checkpoints, world.rank, world.size, at_most=back)
    state = checkpoint.read_state(found)
    agreed(lambda: checkpoint.abandon(checkpoints, state["step"]) if world.rank == 0 else None)
    gathered("read")
    changed = guard.go_back(trouble, state["step"], in_a_row, state["guard"], global_batch)
    agreed(lambda: checkpoint.amend(found, {"guard": changed}) if world.rank == 0 else None)
    return found


def write_samples(
    run: Path, trouble: Trouble, loader: Loader, offset: int, global_batch: int, world: World
) -> None:
    """Append the keys of the trouble's samples to offending-samples.txt: "<step> <sample key>" a line. Every
    rank calls it."""

    def write() -> None:
        with open(run / SAMPLES, "a") as file:
            for step in range(trouble.first, trouble.last + 1):
                positions = offset + (step - 1) * global_batch + np.arange(global_batch)
                images = np.unique(positions // loader.recipe.data.crops_per_image)
                keys = loader.keys(loader.stream.locate(images))
                file.write("".join(f"{step} {key}\n" for key in keys))

    agreed(lambda: write() if world.rank == 0 else None)
