"""All termination rules: those of this package, and those that others register.

A package adds rules by entry points of the group `kat_ray.termination_rules`; each names a `RuleType`. How to write
one: docs/termination.md.
"""

from __future__ import annotations

import functools
import operator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from kat_ray.termination import (
    fixed_prefix,
    kat_stages,
    kat_table,
    length_matched,
    none,
    progressive,
    prune_opd,
    random,
    repetition,
)
from kat_ray.termination.base import RuleType, RunFacts, TerminationRule
from kat_ray.termination.settings import KatSettings, NoneSettings, RuleSettings

GROUP = "kat_ray.termination_rules"


def _found() -> dict[str, RuleType]:
    kinds = [
        RuleType(NoneSettings, none.make),
        RuleType(KatSettings, kat_table.make),
        RuleType(kat_stages.KatStagesSettings, kat_stages.make),
        RuleType(fixed_prefix.FixedPrefixSettings, fixed_prefix.make),
        RuleType(random.RandomSettings, random.make),
        RuleType(length_matched.LengthMatchedSettings, length_matched.make),
        RuleType(repetition.RepetitionSettings, repetition.make),
        RuleType(prune_opd.PruneSettings, prune_opd.make),
        RuleType(progressive.ProgressiveSettings, progressive.make),
    ]
    kinds += [point.load() for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)]
    names = [kind.name for kind in kinds]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two termination rules are called {sorted(twice)}: see the entry points of {GROUP}"
    return dict(zip(names, kinds, strict=True))


RULES = _found()

if TYPE_CHECKING:
    TerminationConfig: TypeAlias = RuleSettings
else:
    TerminationConfig = Annotated[
        functools.reduce(operator.or_, (kind.settings for kind in RULES.values())), Field(discriminator="rule")
    ]


def make_rule(settings: RuleSettings, facts: RunFacts) -> TerminationRule:
    """The rule that the settings describe, with an empty calibration."""
    return RULES[settings.rule].make(settings, facts)
