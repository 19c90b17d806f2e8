"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float, floor: float = 0.0) -> float:
    """Return the rate for the step after `step` completed ones: linear warm-up, then half a cosine to `floor`.

    As the official MAE code (util/lr_sched.py), which sets it at every iteration.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_warning(total_steps: int, warmup_steps: float) -> str | None:
    """Return a warning if the run ends before the warm-up does."""
    if warmup_steps < total_steps:
        return None
    return (
        f"warm-up of {warmup_steps:.0f} steps is not shorter than the run of {total_steps}: the learning rate never "
        "reaches its peak; train longer or shorten the warm-up"
    )
