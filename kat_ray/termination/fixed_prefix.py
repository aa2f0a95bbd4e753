"""Only the first n tokens of every rollout are kept (ESR, arXiv 2605.27028, with n = 100).

    cut = n, for every rollout that goes on after n tokens        [tokens]

KAT's paper has it as a control with n = 1024; longer prefixes are not better there: 4096 is worse than 2048.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from kat_ray.termination.base import RuleType, RunFacts, RunScale
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import LengthRule, shares_of


class FixedPrefixSettings(CuttingSettings):
    """Every rollout is cut after the same number of tokens."""

    rule: Literal["fixed_prefix"] = "fixed_prefix"
    n: int = Field(1024, ge=1)
    """Tokens that are kept."""


def make(settings: FixedPrefixSettings, facts: RunFacts) -> LengthRule:
    """The rule that the settings describe."""
    return LengthRule(lambda start, step: settings.n)


def _warnings(settings: FixedPrefixSettings, run: RunScale) -> Iterator[str]:
    if settings.n >= run.max_tokens:
        yield f"n = {settings.n} >= rollout.max_tokens = {run.max_tokens}: nothing will be cut"


KIND = RuleType(
    FixedPrefixSettings,
    make,
    reads=(),
    sweep=lambda settings, max_tokens: {"n": shares_of(max_tokens)},
    warnings=_warnings,
)
