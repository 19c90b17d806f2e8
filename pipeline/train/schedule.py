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
