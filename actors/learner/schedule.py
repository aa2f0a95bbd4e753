"""The learning rate of a step."""

from __future__ import annotations

import math

from kat_ray.config import Config, LearnerConfig


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


def schedule_note(before: Config, after: Config, done: int) -> str | None:
    """What another `run.steps` does to the learning rate of a run that goes on after `done` steps, if anything.

    The schedule goes by the run's whole length, so its rate may jump, and after a cosine that has ended it does.
    """
    old, new = before.run.steps, after.run.steps
    if old == new or not done:
        return None
    learner = after.learner
    last, following = (
        lr_factor(step, steps, learner.warmup_ratio, learner.min_lr_ratio)
        for step, steps in ((done - 1, old), (done, new))
    )
    return (
        f"run.steps = {new}, and {old} so far: the learning rate's schedule is stretched to it. The last step had "
        f"{last:.3g} of learner.lr = {learner.lr:g}, the next has {following:.3g} of it"
    )
