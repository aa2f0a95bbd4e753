"""The learning rate of a step."""

from __future__ import annotations

import math

from kat_ray.config import LearnerConfig


def learning_rate(step: int, steps: int, learner: LearnerConfig) -> float:
    """The rate at 0-based `step` of a run of `steps`."""
    return learner.lr * lr_factor(step, steps, learner.warmup_ratio, learner.min_lr_ratio)


def lr_factor(step: int, steps: int, warmup_ratio: float, min_ratio: float) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then a cosine down to `min_ratio`."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
