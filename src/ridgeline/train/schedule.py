"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ridgeline.config import OptimizerSection


def learning_rate(step: int, section: OptimizerSection, total_steps: int) -> float:
    """Rate of step ``1 <= step <= total_steps``: linear warm-up to the peak, then half a cosine down to the minimum.

    The peak is reached at step ``warmup_steps``, the minimum at the last step.
    """
    peak, floor, warmup = section.learning_rate, section.min_learning_rate, section.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * share))
