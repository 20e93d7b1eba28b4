"""The learning rate of each optimizer step.

Steps count from 1. The rate rises linearly over the warm-up and stands at its peak at the
warm-up's last step; then it falls so that it would reach the minimum one step *after* the last. So
no step is wasted on a rate of zero, neither the first nor the last.
"""

import math

from qlora_core.config import TrainingConfig


def learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of ``step`` out of ``num_steps``."""
    peak, floor = config.learning_rate, min(config.min_learning_rate, config.learning_rate)
    num_warmup = max(1, math.ceil(config.warmup * num_steps))
    if step < num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup + 1)
    return floor + (peak - floor) * _share_left(progress, config.schedule)


def _share_left(progress: float, schedule: str) -> float:
    """Return how much of the way from floor to peak is left, for ``progress`` in [0, 1)."""
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0 - progress if schedule == "linear" else 1.0
