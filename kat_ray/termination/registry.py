"""All termination rules: those of this package, and those that others register.

A package adds rules by entry points of the group `kat_ray.termination_rules`; each names a `RuleType`. How to write
one: docs/termination.md.
"""

from __future__ import annotations

import functools
import operator
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from kat_ray.errors import UserError
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
_METHODS = ("start_step", "begin", "end_step", "state", "load_state")


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
    rules = {kind.name: kind for kind in kinds}
    origins = dict.fromkeys(rules, "kat-ray itself")
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        kind, origin = _load(point), _described(point)
        if kind.name in rules:
            raise UserError(
                f"two termination rules are called {kind.name!r}: of {origins[kind.name]}, and of {origin}"
            )
        rules[kind.name], origins[kind.name] = kind, origin
    return rules


def _load(point: EntryPoint) -> RuleType:
    """A rule from outside; what its package does wrong beyond this keeps its traceback, for its author."""
    try:
        kind = point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{_described(point)} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall that package"
        ) from error
    if not isinstance(kind, RuleType) or not isinstance(kind.settings.model_fields["rule"].default, str):
        raise UserError(f"{_described(point)} is no RuleType whose settings have a field rule: Literal[...] = ...")
    return kind


def _described(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"entry point {point.name!r} = {point.value} of {package} (group {GROUP})"


RULES = _found()

if TYPE_CHECKING:
    TerminationConfig: TypeAlias = RuleSettings
else:
    TerminationConfig = Annotated[
        functools.reduce(operator.or_, (kind.settings for kind in RULES.values())), Field(discriminator="rule")
    ]


def make_rule(settings: RuleSettings, facts: RunFacts) -> TerminationRule:
    """The rule that the settings describe, with an empty calibration."""
    rule = RULES[settings.rule].make(settings, facts)
    missing = [f"{name}()" for name in _METHODS if not callable(getattr(rule, name, None))]
    if missing:
        raise UserError(
            f"termination.rule = {settings.rule!r}: {type(rule).__module__}.{type(rule).__qualname__} has no "
            f"{' and no '.join(missing)}, which a rule needs (docs/termination.md, a rule of your own)"
        )
    return rule
