"""KAT: KL Agreement Trap Termination (arXiv 2606.09471).

With d[i] the reverse KL of generated token i in nats, window W, stride S, exempt region X, count C:

    z(e)   = mean(d[e-W .. e-1])          for e >= W, e - W a multiple of S
    checked only if e - W >= X
    low(e) = z(e) < s                     s = Q_{1-eta}(B), fixed when the rollout starts
    C consecutive checked windows that are low confirm the trap
    cut    = e_first - W                  the first token of the first window of that streak
    m(y)   = min of z(e), checked or not  up to the confirmation; pushed to the FIFO buffer B

With a `budget` s is instead the largest threshold whose cuts remove no larger share of the KL than that, by the
rollouts in B (`calibration.ShareBuffer`). The rule is inactive (s is None) until B holds `min_samples` rollouts and
`min_steps` optimiser steps are done. Why B is fed by probes once the rule is active: docs/termination.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kat_ray.termination.base import Cut, Finished, NewTokens, RolloutStart, RolloutTracker, RunScale
from kat_ray.termination.calibration import calibration
from kat_ray.termination.settings import KatParameters
from kat_ray.termination.staircase import Staircase, staircase
from kat_ray.termination.window import WindowMean

_LONG_LAG = 100  # steps; the embedded task's KL scale falls by half within 20
_LONG_BUDGET_LAG = 40  # with a budget: more than it is lost while the KL falls
_PRICE = 0.5  # share of the budget from which on its bound's price is worth a word
# What a replay tries where the user names nothing: factors of the rule's own values, or values.
_FACTORS = {"window": (0.5, 1, 2), "consecutive": (0.5, 1, 2), "exempt": (0, 1, 2), "stride": (1, 4)}
_ETAS = (0.1, 0.2, 0.3, 0.5, 0.7)
_RENEWAL = 10  # steps in which a full buffer is renewed by probes, where so many are to be had
_FEWEST_PROBES = 0.01  # share of the rollouts
_BUDGETS = (0.01, 0.02, 0.03, 0.05, 0.1)


class KatTracker:
    """One rollout under the KAT rule.

    A probe goes on after the rule's decision: its cut says what the rule would have done, and its minimum
    stays uncensored.
    """

    __slots__ = ("_probe", "_seen", "_settings", "_streak", "_window", "cut", "minimum", "recovered", "threshold")

    weights: Sequence[float] | None = None

    def __init__(self, settings: KatParameters, threshold: float | None, probe: bool) -> None:
        self._settings = settings
        self._probe = probe
        self._window = WindowMean(settings.window)
        self._seen: list[float] | None = [] if tells_all(settings, threshold, probe) else None
        self._streak = 0
        self.threshold = threshold
        self.cut: Cut | None = None
        self.minimum: float | None = None
        # Of a probe: the token that ended the low stretch after the cut; None while it lasts.
        self.recovered: int | None = None

    @property
    def seen(self) -> int:
        """Number of d's observed: up to the decision, or all of a probe's."""
        return self._window.count

    @property
    def evidence(self) -> Staircase | None:
        """What a budget's calibration asks of a rollout that is followed to its end."""
        return None if self._seen is None else staircase(np.array(self._seen), self._settings)

    def observe(self, tokens: NewTokens) -> Cut | None:
        """Take the next d's in order; unless the rollout is a probe, values after a decision are ignored."""
        values = tokens.d.tolist()
        if self._seen is not None:
            self._seen += values
        for value in values:
            if self.cut is not None and not self._probe:
                break
            z = self._window.push(value)
            if z is not None:
                self._take(z)
        return self.cut

    def _take(self, z: float) -> None:
        rule = self._settings
        first = self._window.count - rule.window
        if first % rule.stride:
            return
        if z == z and (self.minimum is None or z < self.minimum):  # z != z: the window holds a NaN
            self.minimum = z
        if self.threshold is None or first < rule.exempt:
            return
        if self.cut is not None:
            if self.recovered is None and not z < self.threshold:
                self.recovered = self._window.count - 1
            return
        self._streak = self._streak + 1 if z < self.threshold else 0
        if self._streak == rule.consecutive:
            start = first - (rule.consecutive - 1) * rule.stride
            self.cut = Cut(at=start, confirmed=self._window.count)


class KatRule:
    """The calibration that all rollouts share."""

    budget: int | None = None

    def __init__(self, settings: KatParameters) -> None:
        self._settings = settings
        self._buffer = calibration(settings)
        self._rollouts = 0  # that ended in the last step
        self.threshold: float | None = None

    @property
    def probe_share(self) -> float | None:
        """Share of the next rollouts that are probes; None leaves it at the setting's.

        A probe costs what its cut would have saved. With a budget and a full buffer it is worth that only as far as
        the buffer is to follow the student: renewed within `_RENEWAL` steps, it follows as fast as one can ask.
        """
        full = len(self._buffer) >= self._settings.buffer
        if self._settings.budget is None or self.threshold is None or not full or not self._rollouts:
            return None
        worth = self._settings.buffer / (_RENEWAL * self._rollouts)
        return min(self._settings.probe_share, max(_FEWEST_PROBES, worth))

    @property
    def samples(self) -> int:
        """Rollouts in the buffer."""
        return len(self._buffer)

    def start_step(self, step: int) -> None:
        """Fix the threshold for the rollouts of optimiser step `step` (0-based)."""
        rule = self._settings
        active = step >= rule.min_steps and len(self._buffer) >= rule.min_samples
        self.threshold = self._buffer.threshold() if active else None

    def begin(self, start: RolloutStart) -> RolloutTracker:
        """Start a rollout under the present threshold."""
        return KatTracker(self._settings, self.threshold, start.probe)

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Feed the buffer with the rollouts that `calibrate_on` admits."""
        self._rollouts = len(finished)
        for rollout in finished:
            if self._admits(rollout):
                self._buffer.push(rollout)

    def state(self) -> dict[str, Any]:
        """The buffer in order, and the threshold."""
        state = self._buffer.state(self.threshold)
        return state if self._settings.budget is None else state | {"rollouts": self._rollouts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from it; a smaller buffer than the one saved keeps the newest rollouts."""
        self.threshold = self._buffer.load(state)
        self._rollouts = state.get("rollouts", 0)

    def _admits(self, rollout: Finished) -> bool:
        if self.threshold is None:
            return True  # nothing was cut: every rollout is uncensored
        match self._settings.calibrate_on:
            case "probes":
                return rollout.probe
            case "finished":
                return not rollout.cut
            case "all":
                return True


def tells_all(rule: KatParameters, threshold: float | None, probe: bool) -> bool:
    """Whether a rollout is kept whole for the calibration: with a budget, if it is followed to its end."""
    return rule.budget is not None and (probe or threshold is None)


def values_to_try(rule: KatParameters, max_tokens: int) -> dict[str, list[Any]]:
    """Values around the rule's own for a replay to try."""
    grid: dict[str, list[Any]] = {}
    for name, factors in _FACTORS.items():
        own = getattr(rule, name)
        grid[name] = sorted({max(0 if name == "exempt" else 1, round(own * f)) for f in factors})
    if rule.budget is not None:
        enough = {b for b in _BUDGETS if rule.buffer >= 1 / b - 1}
        return grid | {"budget": sorted({*enough, rule.budget})}
    return grid | {"eta": sorted({*_ETAS, rule.eta})}


def settings_in_vain(rule: KatParameters, run: RunScale) -> Iterator[str]:
    """A line for each setting that keeps the rule from acting in this run, or makes its threshold lag."""
    first = rule.exempt + rule.window + (rule.consecutive - 1) * rule.stride
    if first > run.max_tokens:
        yield (
            f"the rule can confirm a trap after {first} tokens at the earliest (exempt + window + "
            f"(consecutive - 1) x stride), rollouts end at rollout.max_tokens = {run.max_tokens}: "
            "nothing will be cut"
        )
    if rule.window > run.max_tokens:
        yield f"window = {rule.window} > rollout.max_tokens: no window is ever full"
    if rule.min_steps >= run.steps or rule.min_samples > run.steps * run.rollouts_per_step:
        yield "the run ends before the rule becomes active (min_steps, min_samples)"
    yield from _budget_in_vain(rule)
    probes = rule.probe_share * run.rollouts_per_step
    longest = _LONG_LAG if rule.budget is None else _LONG_BUDGET_LAG
    if rule.calibrate_on == "probes" and rule.buffer / probes > longest:
        yield (
            f"buffer = {rule.buffer} holds the probes of {rule.buffer / probes:.0f} steps ({probes:.3g} a step): "
            "so long the threshold lags behind the KL. docs/termination.md advises buffer = probe_share x rollouts "
            f"per step x 10 = {max(_smallest(rule), round(10 * probes))}, with min_samples <= buffer; or raise "
            "probe_share"
        )


def _smallest(rule: KatParameters) -> int:
    """Rollouts below which the buffer allows no cut."""
    return math.ceil(1 / rule.budget - 1) if rule.budget else 1


def _budget_in_vain(rule: KatParameters) -> Iterator[str]:
    if rule.budget is None:
        return
    if rule.budget == 0:
        yield "budget = 0: nothing will be cut"
        return
    if rule.eta != KatParameters.model_fields["eta"].default:
        yield f"eta = {rule.eta:g} does nothing: budget = {rule.budget:g} sets the threshold; budget=null lets eta"
    price = 1 / (rule.buffer + 1)
    if price > _PRICE * rule.budget:
        yield (
            f"buffer = {rule.buffer}: the bound for so few rollouts takes {price / rule.budget:.0%} of budget = "
            f"{rule.budget:g}; buffer = {math.ceil(1 / (_PRICE * rule.budget)) - 1} would leave half of it for cuts"
        )
