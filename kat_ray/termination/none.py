"""No termination, the baseline: plain on-policy distillation (as in arXiv 2306.13649).

    cut = never: a rollout ends at its end of sequence, or after rollout.max_tokens        [tokens]

d's are scored and recorded as with the other rules, and there are no probes: no rollout is touched.
"""

from __future__ import annotations

from kat_ray.termination.base import Effect, RuleType, RunFacts
from kat_ray.termination.settings import NoneSettings
from kat_ray.termination.uncalibrated import LengthRule


def make(settings: NoneSettings, facts: RunFacts) -> LengthRule:
    """The rule that never cuts."""
    return LengthRule(lambda start, step: None)


KIND = RuleType(NoneSettings, make, Effect.NOTHING, reads=())
