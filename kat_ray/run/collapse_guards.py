"""Collapse guards: metrics that run away in a way from which training does not come back.

Four are known in public: the student unlearns to stop, or stops at once; its entropy goes; its rollouts all run to
the cap; the KL leaves its scale. Each is held against a limit, most against the mean of the run's own first steps.
Two more tell that what is learnt is not what it seems: sampler and learner compute different models, or the KL sees
too little of the student. Pure: the driver feeds each step's metrics and does what the verdict says. Left out:
anything that needs more than one number a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from kat_ray.config import GuardsConfig
from kat_ray.models.tolerance import LogprobDifference, logprob_tolerance
from kat_ray.run.step_result import StepResult


@dataclass(frozen=True)
class _Guard:
    """One limit: `field` of `GuardsConfig` sets it, `limit(setting, reference)` is it, in the metric's unit.

    With `tolerance` the reference is that, of the data types of sampler and learner.
    """

    field: str
    metric: str  # for messages, and for the state of a checkpoint
    value: Callable[[StepResult], float | None]  # None: it says nothing in this step
    above: bool  # the limit is an upper one
    limit: Callable[[float, float], float]
    advice: str
    least: float | None = None  # smallest reference that a limit can be taken from; None: needs no mean
    tolerance: Callable[[LogprobDifference], float] | None = None
    at_once: bool = False  # fires at its first step, whatever `patience`
    name: str = ""  # of its counts; empty: the field's

    @property
    def key(self) -> str:
        """What its counts are called in a checkpoint."""
        return self.name or self.field


def _share(setting: float, reference: float) -> float:
    return setting * reference


def _stop_mass(step: StepResult) -> float | None:
    return step.learner.stop_mass if step.learner.tokens else None


def _entropy(step: StepResult) -> float | None:
    return step.learner.entropy if step.learner.tokens else None


def _max_tokens_share(step: StepResult) -> float | None:
    return step.max_tokens_share if step.budget is None else None


def _kl(step: StepResult) -> float | None:
    return step.kl_mean


def _tail_mass(step: StepResult) -> float | None:
    return step.learner.tail_mass if step.learner.tokens else None


_OTHER_MODEL = (
    "sampler and learner compute different models, and what is learnt is not what was sampled: compare the engines "
    "(docs/numbers.md), take student.dtype = learner.dtype = float32 for a few steps; raise or null "
    "guards.logprob_diff only where you know why"
)


def _logprob_diff(kind: Literal["mean", "max"], *, at_once: bool = False) -> _Guard:
    """How far sampler and learner are apart, against what rounding explains."""
    name = f"logprob_diff_{kind}"

    def value(step: StepResult) -> float | None:
        # A difference that older weights explain says nothing of the engines.
        return getattr(step.learner, name) if step.learner.tokens and not step.staleness else None

    return _Guard(
        "logprob_diff", f"learner/{name}", value, True, _share, _OTHER_MODEL, tolerance=attrgetter(kind),
        at_once=at_once, name=name,
    )  # fmt: skip


_GUARDS = (
    _Guard(
        "stop_mass_fall",
        "learner/stop_mass",
        _stop_mass,
        False,
        _share,
        "the student unlearns to end its answers: use rollout.eos = merged, compare the two models' stop ids "
        "(kat-ray doctor), lower learner.lr",
        least=1e-6,
    ),
    _Guard(
        "stop_mass_rise",
        "learner/stop_mass",
        _stop_mass,
        True,
        lambda setting, reference: reference + setting * (1.0 - reference),
        "the student ends its answers at once: check data.chat_template and what the teacher says to an empty "
        "answer, lower learner.lr",
        least=0.0,
    ),
    _Guard(
        "entropy_fall",
        "learner/entropy",
        _entropy,
        False,
        _share,
        "the student has become sure of everything: lower learner.lr, raise rollout.top_p or rollout.temperature, "
        "take more prompts a step",
        least=1e-3,
    ),
    _Guard(
        "max_tokens_share",
        "rollout/max_tokens_share",
        _max_tokens_share,
        True,
        lambda setting, _: setting,
        "nearly all rollouts run to the cap: look for loops (kat-ray report), raise rollout.max_tokens if answers "
        "are cut off, use termination.rule = kat or repetition, rollout.eos = merged",
    ),
    _Guard(
        "kl_rise",
        "kl/mean",
        _kl,
        True,
        _share,
        "the student moves away from the teacher: lower learner.lr, look at learner/logprob_diff_max and "
        "learner/grad_norm",
        least=1e-3,
    ),
    _Guard(
        "kl_fall",
        "kl/mean",
        _kl,
        False,
        _share,
        "the teacher agrees with everything: look for loops that it follows (kat-ray report); if answers are good, "
        "the student has learnt what it can, and fewer run.steps do",
        least=1e-3,
    ),
    _logprob_diff("mean", at_once=True),
    _logprob_diff("max"),
    _Guard(
        "tail_mass",
        "learner/tail_mass",
        _tail_mass,
        True,
        lambda setting, _: setting,
        "the KL sees this mass as one event, and not where in it the models differ: raise rollout.top_k_logprobs "
        "(learner/top_k_for_99 would see 99 %)",
    ),
)


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
        self._dtypes, self._tolerance = dtypes, logprob_tolerance(*dtypes)
        self._first: dict[str, list[float]] = {}  # values of the first steps, by metric
        self._beyond = {g.key: 0 for g in _GUARDS}  # steps in a row beyond the limit
        self._within = {g.key: 0 for g in _GUARDS}  # and within it
        self._said = {g.key: 0 for g in _GUARDS}  # lines since the metric was last within it for long

    def observe(self, step: StepResult) -> Verdict:
        """Take the next step.

        A value that is missing or not finite, and the learner's where no token was in its loss, neither fires nor
        calms a guard. Where a rule sets a budget, rollouts are meant to reach it, and their length is not guarded.
        """
        values = {g.metric: g.value(step) for g in _GUARDS}
        seen = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
        notes: list[str] = []
        fired = 0
        stops: dict[str, str] = {}  # message: field of the action
        for guard in _GUARDS:
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
        for name in {g.metric for g in _GUARDS if g.least is not None} & {*seen}:
            if len(first := self._first.setdefault(name, [])) < self._config.reference_steps:
                first.append(seen[name])
        fields = tuple(dict.fromkeys(stops.values()))
        return Verdict(tuple(notes), fired, "; ".join(stops) if stops else None, fields)

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

    def _limit(self, guard: _Guard) -> float | None:
        """The guard's limit; None while it has none."""
        setting: float | None = getattr(self._config, guard.field)
        if setting is None:
            return None
        if guard.tolerance is not None:
            return guard.limit(setting, guard.tolerance(self._tolerance))
        if guard.least is None:
            return setting
        first = self._first.get(guard.metric, [])
        if len(first) < self._config.reference_steps or self._reference(guard) < guard.least:
            return None
        return guard.limit(setting, self._reference(guard))

    def _reference(self, guard: _Guard) -> float:
        values = self._first[guard.metric]
        return sum(values) / len(values)

    def _patience(self, guard: _Guard) -> int:
        return 1 if guard.at_once else self._config.patience

    def _count(self, guard: _Guard, beyond: bool) -> int:
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

    def _message(self, guard: _Guard, step: int, value: float, limit: float) -> str:
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
