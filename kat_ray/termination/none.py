"""No termination: every rollout goes on to its end of sequence or its token limit."""

from __future__ import annotations

from kat_ray.termination.base import RunFacts
from kat_ray.termination.settings import NoneSettings
from kat_ray.termination.uncalibrated import LengthRule


def make(settings: NoneSettings, facts: RunFacts) -> LengthRule:
    """The rule that never cuts."""
    return LengthRule(lambda start, step: None)
