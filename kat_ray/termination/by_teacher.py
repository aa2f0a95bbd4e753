"""A rule for each teacher of a run: the KL of two tasks has two scales, so each has its own calibration.

One teacher's rule is the rule itself, with the state that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kat_ray.errors import UserError
from kat_ray.termination.base import Finished, NewTokens, RolloutStart, RunFacts, TerminationRule
from kat_ray.termination.registry import make_rule
from kat_ray.termination.settings import RuleSettings
from kat_ray.termination.table import RolloutTable, TrackerState, make_table
from kat_ray.types.records import IntArray, StepStart

_KEY = "teachers"  # of the state of several


class TeacherRules:
    """Rules of the same settings, by the teacher whose scores each of them sees."""

    def __init__(self, settings: RuleSettings, facts: RunFacts, teachers: Sequence[str]) -> None:
        assert teachers, "a rule judges by the scores of some teacher"
        self._rules = {name: make_rule(settings, facts) for name in teachers}

    @property
    def samples(self) -> int:
        """Rollouts in the calibrations."""
        return sum(rule.samples for rule in self._rules.values())

    def start_step(self, step: int) -> StepStart:
        """Fix the limits of the rollouts of optimiser step `step` (0-based)."""
        starts = {name: _started(rule, step) for name, rule in self._rules.items()}
        if len(starts) == 1:
            return next(iter(starts.values()))
        return StepStart(None, None, by_teacher=starts)

    def table(self, starts: Sequence[RolloutStart], teachers: Sequence[str]) -> RolloutTable:
        """Start rollouts under the present limits, in the order of rows; `teachers` names who scores each.

        Without names they are those of the only teacher.
        """
        if len(self._rules) == 1:
            return make_table(next(iter(self._rules.values())), starts)
        return _TeacherTable(self._rules, starts, teachers)

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Take the rollouts that ended in the step, in a fixed order: each is its teacher's."""
        if len(self._rules) == 1:
            next(iter(self._rules.values())).end_step(finished)
            return
        for name, rule in self._rules.items():
            rule.end_step([rollout for rollout in finished if rollout.teacher == name])

    def state(self) -> dict[str, Any]:
        """All that rules of the same settings and names need to go on; of one teacher the state of its rule."""
        if len(self._rules) == 1:
            return next(iter(self._rules.values())).state()
        return {_KEY: {name: rule.state() for name, rule in self._rules.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; `UserError` where it is that of other teachers."""
        if len(self._rules) == 1:
            next(iter(self._rules.values())).load_state(state)
            return
        held = state.get(_KEY)
        if not isinstance(held, Mapping) or held.keys() != self._rules.keys():
            known = ", ".join(held) if isinstance(held, Mapping) else "one teacher alone"
            raise UserError(
                f"the calibration is that of {known}, and the run's teachers are {', '.join(self._rules)}: start a "
                "new run"
            )
        for name, rule in self._rules.items():
            rule.load_state(held[name])


def _started(rule: TerminationRule, step: int) -> StepStart:
    rule.start_step(step)
    # An addition to the interface of rules: those of other packages may lack it.
    return StepStart(rule.threshold, rule.budget, getattr(rule, "probe_share", None))


class _TeacherTable:
    """Rollouts of several teachers: a row is one in the table of its teacher's rule."""

    def __init__(
        self, rules: Mapping[str, TerminationRule], starts: Sequence[RolloutStart], teachers: Sequence[str]
    ) -> None:
        assert len(starts) == len(teachers), f"{len(starts)} rollouts, and the teachers of {len(teachers)}"
        names = list(rules)
        self._which = np.array([names.index(name) for name in teachers], dtype=np.int64)
        self._inner = np.zeros(len(starts), dtype=np.int64)
        self._tables: list[RolloutTable] = []
        for number, rule in enumerate(rules.values()):
            own = np.flatnonzero(self._which == number)
            self._inner[own] = np.arange(len(own))
            self._tables.append(make_table(rule, [starts[i] for i in own.tolist()]))

    def observe(
        self, rows: IntArray, tokens: NewTokens, first: IntArray, count: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Pass each row's tokens to its teacher's table."""
        cuts, confirmed = np.full(len(rows), -1), np.full(len(rows), -1)
        which = self._which[rows]
        for number, table in enumerate(self._tables):
            own = np.flatnonzero(which == number)
            if len(own):
                cuts[own], confirmed[own] = table.observe(self._inner[rows[own]], tokens, first[own], count[own])
        return cuts, confirmed

    def tracker_state(self, row: int) -> TrackerState:
        """What the table of the row's teacher says."""
        return self._tables[int(self._which[row])].tracker_state(int(self._inner[row]))
