"""The learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from typing import Literal


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: float,
    peak: float,
    floor: float = 0.0,
    decay: Literal["cosine", "linear", "steps"] = "cosine",
    decay_steps: Sequence[float] = (),
) -> float:
    """Return the rate for the step after `step` completed ones: linear warm-up, then the decay.

    The cosine is that of the official MAE code (util/lr_sched.py), which sets it at every iteration. "linear" is a
    polynomial decay of power 1 (mmsegmentation's). "steps" divides by 10 at these shares of the run (detectron2's).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "steps":
        return max(floor, peak * 0.1 ** sum(step >= share * total_steps for share in decay_steps))
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * remaining


def warmup_warning(total_steps: int, warmup_steps: float) -> str | None:
    """Return a warning if the run ends before the warm-up does."""
    if warmup_steps < total_steps:
        return None
    return (
        f"warm-up of {warmup_steps:.0f} steps is not shorter than the run of {total_steps}: the learning rate never "
        "reaches its peak; train longer or shorten the warm-up"
    )
