"""Collapse guards: metrics that run away in a way from which training does not come back.

Four are known in public: the student unlearns to stop, or stops at once; its entropy goes; its rollouts all run to
the cap; the KL leaves its scale. Each is held against a limit, most against the mean of the run's own first steps.
Others tell that what is learnt is not what it seems: sampler and learner compute different models, the KL sees too
little of the student, rewards rise while held-out answers get worse. Pure: the driver feeds each step's metrics and
does what the verdict says. Left out: anything that needs more than one number a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kat_ray.config import GuardsConfig
from kat_ray.run.guard_list import GUARDS, Guard
from kat_ray.run.step_result import StepResult


@dataclass(frozen=True)
class Verdict:
    """What to do after a step: show `notes`, record `fired`, and end the run with `stop` if it is not None."""

    notes: tuple[str, ...]
    fired: int  # guards whose metric has been beyond its limit for as many steps as it takes
    stop: str | None
    stop_fields: tuple[str, ...] = ()  # whose value is `stop`


class CollapseGuards:
    """Call `observe` once a step, in order. A guard says at most two lines each time its metric passes its limit.

    The first when it has been beyond it for half of `patience`, the second when it fires. It can speak again once
    the metric has been within its limit for `patience` steps in a row.
    """

    def __init__(self, config: GuardsConfig, dtypes: tuple[str, str] = ("float32", "float32")) -> None:
        """`dtypes`: the sampler's and the learner's."""
        self._config = config
        self._dtypes = dtypes
        self._first: dict[str, list[float]] = {}  # values of the first steps, by metric
        self._beyond = {g.key: 0 for g in GUARDS}  # steps in a row beyond the limit
        self._within = {g.key: 0 for g in GUARDS}  # and within it
        self._said = {g.key: 0 for g in GUARDS}  # lines since the metric was last within it for long

    def observe(self, step: StepResult) -> Verdict:
        """Take the next step.

        A value that is missing or not finite, and the learner's where no token was in its loss, neither fires nor
        calms a guard. Where a rule sets a budget, rollouts are meant to reach it, and their length is not guarded.
        """
        values = {g.metric: g.value(step) for g in GUARDS}
        seen = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
        notes: list[str] = []
        fired = 0
        stops: dict[str, str] = {}  # message: field of the action
        for guard in GUARDS:
            if guard.metric not in seen or (limit := self._limit(guard)) is None:
                continue
            value = seen[guard.metric]
            lines = self._count(guard, value > limit if guard.above else value < limit)
            text = self._message(guard, step.done, value, limit)
            has_fired = self._beyond[guard.key] >= self._patience(guard)
            fired += has_fired
            action = f"{guard.field}_action" if hasattr(self._config, f"{guard.field}_action") else "action"
            if has_fired and getattr(self._config, action) == "stop":
                stops[text] = f"guards.{action}"
            else:
                notes += [text] * lines
        for name in {g.metric for g in GUARDS if g.least is not None} & {*seen}:
            if len(first := self._first.setdefault(name, [])) < self._config.reference_steps:
                first.append(seen[name])
        fields = tuple(dict.fromkeys(stops.values()))
        return Verdict(tuple(notes), fired, "; ".join(stops) if stops else None, fields)

    def judge(self, field: str, done: int, value: float) -> str | None:
        """What the guard of this field says of a value after the last step; None where it is within its limit."""
        (guard,) = (g for g in GUARDS if g.field == field)
        limit = self._limit(guard)
        if limit is None or not (value > limit if guard.above else value < limit):
            return None
        self._beyond[guard.key] += 1
        return self._message(guard, done, value, limit)

    def state(self) -> dict[str, Any]:
        """What has been seen so far, as JSON."""
        names = ("first", "beyond", "within", "said")
        # A copy all through: it is written to a checkpoint when later steps have been observed.
        return {name: copy.deepcopy(dict(getattr(self, f"_{name}"))) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._first = {name: list(values) for name, values in state["first"].items()}
        for name in ("beyond", "within", "said"):
            getattr(self, f"_{name}").update(state[name])

    def _limit(self, guard: Guard) -> float | None:
        """The guard's limit; None while it has none."""
        setting: float | None = getattr(self._config, guard.field)
        if setting is None:
            return None
        if guard.tolerance is not None:
            return guard.limit(setting, guard.tolerance(*self._dtypes))
        if guard.least is None:
            return setting
        first = self._first.get(guard.metric, [])
        if len(first) < self._config.reference_steps or self._reference(guard) < guard.least:
            return None
        return guard.limit(setting, self._reference(guard))

    def _reference(self, guard: Guard) -> float:
        values = self._first[guard.metric]
        return sum(values) / len(values)

    def _patience(self, guard: Guard) -> int:
        return 1 if guard.at_once else self._config.patience

    def _count(self, guard: Guard, beyond: bool) -> int:
        """Note whether the metric is beyond its limit; returns how many lines (0 or 1) are due."""
        name, patience = guard.key, self._patience(guard)
        self._beyond[name] = self._beyond[name] + 1 if beyond else 0
        self._within[name] = 0 if beyond else self._within[name] + 1
        if self._within[name] >= patience:
            self._said[name] = 0
        due = (self._beyond[name] >= (patience + 1) // 2) + (self._beyond[name] >= patience)
        if due <= self._said[name]:
            return 0
        self._said[name] = due
        return 1

    def _message(self, guard: Guard, step: int, value: float, limit: float) -> str:
        setting = getattr(self._config, guard.field)
        count, origin = self._beyond[guard.key], ""
        if guard.tolerance is not None:
            origin = " for a sampler in {} and a learner in {}".format(*self._dtypes)
        elif guard.least is not None:
            first = f"the first {self._config.reference_steps} steps"
            origin = f", set by a mean of {self._reference(guard):.4g} over {first}"
        return (
            f"guards.{guard.field} = {setting:g}: {guard.metric} is {value:.4g} at step {step}, "
            f"{'above' if guard.above else 'below'} {limit:.4g}{origin}, for {count} step{'s' * (count > 1)} in a "
            f"row; {guard.advice}"
        )
