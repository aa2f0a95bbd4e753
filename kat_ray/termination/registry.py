"""All termination rules: those of this package, and those that others register.

A package adds rules by entry points of the group `kat_ray.termination_rules`; each names a `RuleType`. How to write
one: docs/termination.md. Nothing of another package is imported until one of its rules is asked for, or all rules
are to be listed: a package that is broken stops only the runs that want its rule.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

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
from kat_ray.termination.settings import KatParameters, RuleSettings

log = logging.getLogger("kat_ray.termination")

GROUP = "kat_ray.termination_rules"
_METHODS = ("start_step", "begin", "end_step", "state", "load_state")

_OWN = {
    kind.name: kind
    for kind in (
        none.KIND,
        kat_table.KIND,
        kat_stages.KIND,
        fixed_prefix.KIND,
        random.KIND,
        length_matched.KIND,
        repetition.KIND,
        prune_opd.KIND,
        progressive.KIND,
    )
}


class Rules(Mapping[str, RuleType]):
    """Rules by name. A list of all of them leaves out the broken ones of other packages, and says so once."""

    def __init__(self) -> None:
        self._said = False  # what is left out

    def __getitem__(self, name: str) -> RuleType:
        """`KeyError` where there is no such rule; `UserError` where there is one that cannot be used."""
        if name in _OWN and name not in {point.name for point in self._points}:
            return _OWN[name]
        found, broken = self._outside
        if name in broken:
            raise broken[name]
        return _OWN[name] if name in _OWN else found[name]

    def __iter__(self) -> Iterator[str]:
        found, broken = self._outside
        for error in dict.fromkeys(broken.values()) if not self._said else ():
            log.warning("a termination rule is left out: %s", error)
        self._said = True
        return iter([*_OWN, *found])

    def __len__(self) -> int:
        return len(_OWN) + len(self._outside[0])

    @functools.cached_property
    def _points(self) -> list[EntryPoint]:
        return sorted(entry_points(group=GROUP), key=lambda point: point.name)

    @functools.cached_property
    def _outside(self) -> tuple[dict[str, RuleType], dict[str, Exception]]:
        """The rules of other packages, and what is wrong with the others by the names that ask for them."""
        found: dict[str, RuleType] = {}
        origins = dict.fromkeys(_OWN, "kat-ray itself")
        broken: dict[str, Exception] = {}
        for point in self._points:
            names = {point.name}
            try:
                kind = _load(point)
                names.add(kind.name)
                if kind.name in origins:
                    raise UserError(
                        f"two termination rules are called {kind.name!r}: of {origins[kind.name]}, and of "
                        f"{_described(point)}; uninstall one of the two packages"
                    )
            except Exception as error:  # another's code: it is raised where that rule is asked for
                broken |= dict.fromkeys(names, error)
            else:
                found[kind.name], origins[kind.name] = kind, _described(point)
        return {name: kind for name, kind in found.items() if name not in broken}, broken


def _load(point: EntryPoint) -> RuleType:
    """A rule from outside; what its package does wrong beyond this keeps its traceback, for its author."""
    try:
        kind = point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{_described(point)} cannot be loaded: {type(error).__name__}: {error}; fix or uninstall that package"
        ) from error
    if not isinstance(kind, RuleType) or not isinstance(kind.settings.model_fields["rule"].default, str):
        raise UserError(f"{_described(point)} is no RuleType whose settings have a field rule: Literal[...] = ...")
    return kind


def _described(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"entry point {point.name!r} = {point.value} of {package} (group {GROUP})"


RULES = Rules()


def _union(kinds: Iterable[RuleType]) -> TypeAdapter[Any]:
    """Settings of one of several rules, told apart by their field `rule`."""
    settings = functools.reduce(operator.or_, (kind.settings for kind in kinds))
    union: Any = Annotated[settings, Field(discriminator="rule")]
    return TypeAdapter(union)


@functools.cache
def _union_of_own() -> TypeAdapter[Any]:
    return _union(_OWN.values())


@functools.cache
def _union_of_all() -> TypeAdapter[Any]:
    return _union(RULES.values())


class _AnyRule:
    """Pydantic's view of `TerminationConfig`: the union of all rules' settings, made when it is first needed."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(_union_of_all().core_schema)

    @staticmethod
    def _validate(value: Any) -> Any:
        name = value.get("rule") if isinstance(value, Mapping) else getattr(value, "rule", None)
        is_own = isinstance(name, str) and name in _OWN
        return (_union_of_own() if is_own else _union_of_all()).validate_python(value)


if TYPE_CHECKING:
    TerminationConfig: TypeAlias = RuleSettings
else:
    TerminationConfig = Annotated[RuleSettings, _AnyRule]


def kat_parameters(settings: RuleSettings) -> KatParameters | None:
    """The settings, where the rule divides rollouts by KAT's windows; else None."""
    return settings if isinstance(settings, KatParameters) and RULES[settings.rule].by_windows else None


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
