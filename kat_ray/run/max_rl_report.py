"""Rewards below 0 under `max_rl`, which divides by the mean of a group."""

from __future__ import annotations

from kat_ray.config import Config
from kat_ray.run.step_result import StepResult


class MaxRlReport:
    """Says once that rewards are below 0: a mean close to 0 then makes advantages of any size."""

    def __init__(self, config: Config) -> None:
        rl = config.objective.rl
        self._silent = not rl.weight or rl.advantage != "max_rl"

    def observe(self, step: StepResult) -> str | None:
        """Take the next step; the line to show, if there is one."""
        lowest = step.reward_min
        if self._silent or lowest is None or lowest >= 0:
            return None
        self._silent = True
        return (
            f"step {step.done}: rewards go down to {lowest:g}, and objective.rl.advantage = max_rl divides by the "
            "mean of a group: where rewards of both signs nearly cancel its advantages have no bound, and where "
            "the mean is 0 or less they are 0. Give rewards of at least 0, such as by reward.threshold and without "
            "objective.rl.overlong, take another advantage, or set objective.rl.advantage_clip. Not said again"
        )
