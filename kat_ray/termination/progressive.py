"""A horizon that grows (arXiv 2605.31490): rollouts may get longer as training goes on.

    budget(step) = start + (end - start) * min(1, step / steps)        [tokens, rounded]

Nothing is cut: the engine ends a rollout at the budget, so no token is generated in vain. Probes have no budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from kat_ray.termination.base import Effect, RolloutStart, RuleType, RunFacts, RunScale
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import LengthTracker, UncalibratedRule, shares_of


class ProgressiveSettings(CuttingSettings):
    """The longest rollout grows linearly with the optimiser steps."""

    rule: Literal["progressive"] = "progressive"
    start: int = Field(256, ge=1)
    """Longest rollout of the first step, tokens."""
    end: int | None = Field(None, ge=1)
    """Longest rollout from step `steps` on, tokens; null takes rollout.max_tokens."""
    steps: int = Field(100, ge=1)
    """Optimiser steps over which it grows."""


class ProgressiveRule(UncalibratedRule):
    """The horizon of the step."""

    def __init__(self, settings: ProgressiveSettings, end: int) -> None:
        self._settings = settings
        self._end = end
        self.budget: int | None = settings.start

    def start_step(self, step: int) -> None:
        rule = self._settings
        self.budget = round(rule.start + (self._end - rule.start) * min(1.0, step / rule.steps))

    def begin(self, start: RolloutStart) -> LengthTracker:
        """Start a rollout that is never cut."""
        return LengthTracker(None)


def make(settings: ProgressiveSettings, facts: RunFacts) -> ProgressiveRule:
    """The rule that the settings describe."""
    return ProgressiveRule(settings, settings.end or facts.max_tokens)


def _warnings(settings: ProgressiveSettings, run: RunScale) -> Iterator[str]:
    end = f"rollout.max_tokens = {run.max_tokens}" if settings.end is None else f"end = {settings.end}"
    if settings.start > (settings.end or run.max_tokens):
        yield f"start = {settings.start} > {end}: the horizon falls instead of growing"
    if settings.start >= run.max_tokens:
        yield f"start = {settings.start} >= rollout.max_tokens = {run.max_tokens}: the first steps have no horizon"


KIND = RuleType(
    ProgressiveSettings,
    make,
    Effect.BOUNDS,
    reads=(),
    sweep=lambda settings, max_tokens: {"start": shares_of(max_tokens)},
    warnings=_warnings,
)
