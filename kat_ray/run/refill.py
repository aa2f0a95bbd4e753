"""Other prompts for those whose rollouts all have one reward (DAPO's dynamic sampling, arXiv 2503.14476)."""

from __future__ import annotations

from kat_ray.config import Config
from kat_ray.run.step_result import StepResult


def missing_prompts(config: Config, groups: int | None, batches: int) -> int:
    """How many more prompts a step is to sample that has `groups` to learn from after so many batches.

    As many as are missing: every group that tells something is used, and nothing is sampled in vain.
    """
    if groups is None or batches >= config.objective.rl.max_num_gen_batches:
        return 0
    return max(0, config.rollout.prompts_per_step - groups)


class RefillReport:
    """Says where a step went on without all of its groups: once for steps in a row."""

    def __init__(self, config: Config) -> None:
        self._wanted, self._batches = config.rollout.prompts_per_step, config.objective.rl.max_num_gen_batches
        self._said = False

    def observe(self, step: StepResult) -> str | None:
        """Take the next step; the line to show, if there is one."""
        missing = step.missing_groups or 0
        said, self._said = self._said, bool(missing)
        if not missing or said:
            return None
        return (
            f"step {step.done}: {missing:.0f} of {self._wanted} groups are missing: all rollouts of the other "
            f"prompts have one reward, and {self._batches} batches were sampled "
            "(objective.rl.max_num_gen_batches). The step is taken with those that there are; choose prompts that "
            "the student gets right now and then, or raise the bound. Not said again before a step that is full "
            "(group/missing)"
        )
