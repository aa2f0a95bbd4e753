"""KAT: KL Agreement Trap Termination (arXiv 2606.09471).

With d[i] the reverse KL of generated token i in nats, window W, stride S, exempt region X, count C:

    z(e)   = mean(d[e-W .. e-1])          for e >= W, e - W a multiple of S
    looked at only if e - W >= X
    low(e) = z(e) < s                     s = Q_{1-eta}(B), fixed when the rollout starts
    C consecutive looked-at windows that are low confirm the trap
    cut    = e_first - W                  the first token of the first window of that streak
    m(y)   = min of z(e) over all e >= W  up to the confirmation; pushed to the FIFO buffer B

The rule is inactive (s is None) until B holds `min_samples` minima and `min_steps` optimiser steps are
done. Why B is fed by probes once the rule is active: docs/termination.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kat_ray.termination.base import Cut, Finished, NewTokens, RolloutStart, RolloutTracker
from kat_ray.termination.calibration import MinimaBuffer
from kat_ray.termination.settings import KatParameters
from kat_ray.termination.state import CalibrationState, checked
from kat_ray.termination.window import WindowMean


class KatTracker:
    """One rollout under the KAT rule.

    A probe goes on after the rule's decision: its cut says what the rule would have done, and its minimum
    stays uncensored.
    """

    __slots__ = ("_probe", "_settings", "_streak", "_window", "cut", "minimum", "recovered", "threshold")

    weights: Sequence[float] | None = None

    def __init__(self, settings: KatParameters, threshold: float | None, probe: bool) -> None:
        self._settings = settings
        self._probe = probe
        self._window = WindowMean(settings.window)
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

    def observe(self, tokens: NewTokens) -> Cut | None:
        """Take the next d's in order; unless the rollout is a probe, values after a decision are ignored."""
        for value in tokens.d.tolist():
            if self.cut is not None and not self._probe:
                break
            z = self._window.push(value)
            if z is not None:
                self._look(z)
        return self.cut

    def _look(self, z: float) -> None:
        rule = self._settings
        if z == z and (self.minimum is None or z < self.minimum):  # z != z: the window holds a NaN
            self.minimum = z
        first = self._window.count - rule.window
        if self.threshold is None or first < rule.exempt or first % rule.stride:
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
        self._buffer = MinimaBuffer(settings.buffer)
        self.threshold: float | None = None

    @property
    def samples(self) -> int:
        """Minima in the buffer."""
        return len(self._buffer)

    def start_step(self, step: int) -> None:
        """Fix the threshold for the rollouts of optimiser step `step` (0-based)."""
        rule = self._settings
        active = step >= rule.min_steps and len(self._buffer) >= rule.min_samples
        self.threshold = self._buffer.threshold(rule.eta) if active else None

    def begin(self, start: RolloutStart) -> RolloutTracker:
        """Start a rollout under the present threshold."""
        return KatTracker(self._settings, self.threshold, start.probe)

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Feed the buffer with the minima that `calibrate_on` admits."""
        for rollout in finished:
            if rollout.minimum is not None and self._admits(rollout):
                self._buffer.push(rollout.minimum)

    def state(self) -> dict[str, Any]:
        """The buffer in order, and the threshold."""
        return CalibrationState(buffer=self._buffer.values(), threshold=self.threshold).model_dump()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from it; a smaller buffer than the one saved keeps the newest minima."""
        saved = checked(CalibrationState, state)
        self._buffer.replace(saved.buffer)
        self.threshold = saved.threshold

    def _admits(self, rollout: Finished) -> bool:
        if self.threshold is None:
            return True  # nothing was cut: every minimum is uncensored
        match self._settings.calibrate_on:
            case "probes":
                return rollout.probe
            case "finished":
                return not rollout.cut
            case "all":
                return True
