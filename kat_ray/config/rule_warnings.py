"""Settings of a termination rule that are allowed, but silently do nothing, or not what they seem to."""

from __future__ import annotations

from collections.abc import Iterable

from kat_ray.config import Config
from kat_ray.termination import RULES, RunScale


def rule_warnings(config: Config) -> Iterable[str]:
    """One line each, with field, value and what to do."""
    rollout = config.rollout
    run = RunScale(config.run.steps, rollout.max_tokens, rollout.rollouts_per_step)
    return RULES[config.termination.rule].warnings(config.termination, run)
