"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float, floor: float = 0.0) -> float:
    """Rate for the step after `step` finished ones: linear from 0 to `peak`, then half a cosine to `floor`.

    As in the official MAE code (util/lr_sched.py), where it is set at every iteration, not at every epoch.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_warning(total_steps: int, warmup_steps: float) -> str | None:
    """What to say of a run that ends before its rate has risen."""
    if warmup_steps < total_steps:
        return None
    return (
        f"the warm-up, {warmup_steps:.0f} steps, is no shorter than the run, {total_steps}: the learning "
        "rate never reaches its peak and never falls; train longer, or warm up for less"
    )
