"""Rollouts are cut at a length drawn at random (the random control of arXiv 2606.09471).

    cut ~ uniform{1, ..., longest}, for every rollout that goes on after it        [tokens]

The paper's control is not matched to KAT's lengths; for one that is, see `length_matched`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from kat_ray.termination.base import RolloutStart, RuleType, RunFacts
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import LengthRule, shares_of

_RANDOM = 11  # tells this draw from the others that are seeded with (run seed, rollout id)


class RandomSettings(CuttingSettings):
    """Rollouts are cut at lengths drawn uniformly, regardless of KL."""

    rule: Literal["random"] = "random"
    longest: int | None = Field(None, ge=1)
    """Largest length drawn, tokens; null takes rollout.max_tokens."""


def make(settings: RandomSettings, facts: RunFacts) -> LengthRule:
    """The rule that the settings describe; the same seed cuts the same rollouts at the same lengths."""
    longest = settings.longest or facts.max_tokens

    def length(start: RolloutStart, step: int) -> int:
        return 1 + int(np.random.default_rng([facts.seed, _RANDOM, start.rollout_id]).integers(longest))

    return LengthRule(length)


KIND = RuleType(
    RandomSettings, make, reads=(), sweep=lambda settings, max_tokens: {"longest": shares_of(max_tokens)}
)
