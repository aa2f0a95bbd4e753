"""The KAT rule on all rollouts of a step at once, to the bit as `KatTracker` acts on each.

State per rollout: the prefix sums before its last W values and after them, the last value that was not finite, the
streak, the minimum. A chunk of n tokens of R rollouts is one array [R, n]; `numpy.cumsum` along its rows adds
strictly in order, as `WindowMean` does (a test compares both on random values, chunks and settings).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kat_ray.termination.base import Cut, NewTokens, RolloutStart, RuleType, RunFacts
from kat_ray.termination.kat import KatRule, settings_in_vain, tells_all, values_to_try
from kat_ray.termination.settings import KatParameters, KatSettings
from kat_ray.termination.staircase import staircase
from kat_ray.termination.table import TrackerState, padded
from kat_ray.types.records import FloatArray, IntArray

_NONE = np.zeros(0)


class KatTable:
    """The trackers of R rollouts that start under one threshold."""

    def __init__(self, settings: KatParameters, threshold: float | None, probes: Sequence[bool]) -> None:
        rollouts = len(probes)
        self._settings = settings
        self._threshold = threshold
        self._probe = np.asarray(probes, dtype=bool)
        # All values of the rollouts that the calibration asks for, in pieces.
        whole = [row for row, probe in enumerate(probes) if tells_all(settings, threshold, probe)]
        self._whole: dict[int, list[FloatArray]] = {row: [] for row in whole}
        # prefix[:, c]: sum before value `seen - W + c`; the last column is the sum of all.
        self._prefix = np.zeros((rollouts, settings.window + 1))
        self._seen = np.zeros(rollouts, dtype=np.int64)
        # Windows that hold this value are undefined. -1 is before the first value, so that it also covers
        # the windows that are not full yet.
        self._last_bad = np.full(rollouts, -1, dtype=np.int64)
        self._streak = np.zeros(rollouts, dtype=np.int64)
        self._minimum = np.full(rollouts, np.nan)
        self._cut = np.full(rollouts, -1, dtype=np.int64)
        self._confirmed = np.full(rollouts, -1, dtype=np.int64)

    def observe(
        self, rows: IntArray, tokens: NewTokens, first: IntArray, count: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Take the next d's of `rows`; values after a decision are ignored unless the rollout is a probe."""
        decided = (self._cut[rows] >= 0) & ~self._probe[rows]
        n = np.where(decided, 0, count)
        if self._whole:
            for row, start, more in zip(rows.tolist(), first.tolist(), n.tolist(), strict=True):
                if row in self._whole:
                    self._whole[row].append(np.array(tokens.d[start : start + more]))
        if n.any():
            self._take(rows, n, padded(tokens.d, first, n))
        return self._cut[rows], self._confirmed[rows]

    def tracker_state(self, row: int) -> TrackerState:
        """What is known of a row now."""
        cut, minimum, whole = int(self._cut[row]), float(self._minimum[row]), self._whole.get(row)
        return TrackerState(
            threshold=self._threshold,
            cut=Cut(cut, int(self._confirmed[row])) if cut >= 0 else None,
            minimum=None if np.isnan(minimum) else minimum,
            evidence=staircase(np.concatenate([_NONE, *whole]), self._settings) if whole is not None else None,
        )

    def _take(self, rows: IntArray, n: IntArray, values_RN: FloatArray) -> None:
        window, width = self._settings.window, values_RN.shape[1]
        finite = np.isfinite(values_RN)
        sums = np.empty((len(rows), window + 1 + width))
        sums[:, : window + 1] = self._prefix[rows]
        sums[:, window + 1 :] = np.where(finite, values_RN, 0.0)
        np.cumsum(sums[:, window:], axis=1, out=sums[:, window:])
        z = (sums[:, window + 1 :] - sums[:, 1 : width + 1]) / window
        ends = self._seen[rows, None] + np.arange(1, width + 1)  # tokens seen after each value
        last_bad = np.maximum.accumulate(np.where(finite, self._last_bad[rows, None], ends - 1), axis=1)
        z[last_bad >= ends - window] = np.nan
        z[(ends - window) % self._settings.stride != 0] = np.nan
        taken = self._decide(rows, n, z, ends)
        if (taken < n).any():
            z[np.arange(width) >= taken[:, None]] = np.nan
        self._minimum[rows] = np.fmin(self._minimum[rows], np.fmin.reduce(z, axis=1))
        self._seen[rows] += taken
        self._prefix[rows] = _columns(sums, taken, window + 1)
        some = taken > 0
        self._last_bad[rows[some]] = last_bad[some, taken[some] - 1]

    def _decide(self, rows: IntArray, n: IntArray, z_RN: FloatArray, ends_RN: IntArray) -> IntArray:
        """Move streaks and set cuts; returns how many of the n new values of each row count, [R]."""
        rule = self._settings
        if self._threshold is None:
            return n
        starts = ends_RN - rule.window
        checked = (starts >= rule.exempt) & (starts % rule.stride == 0)
        high = checked & ~(z_RN < self._threshold)
        # A streak is what was checked since the last high window; before the first column it was `_streak`.
        number = np.cumsum(checked, axis=1)
        broken = np.maximum.accumulate(np.where(high, number, -self._streak[rows, None]), axis=1)
        streak = number - broken
        hit = checked & (streak == rule.consecutive)
        # Past a row's end z is NaN, hence high: it breaks streaks there, and confirms nothing.
        new = hit.any(axis=1) & (self._cut[rows] < 0)
        at = hit.argmax(axis=1)
        confirmed = np.take_along_axis(ends_RN, at[:, None], 1)[:, 0]
        decided = rows[new]
        self._confirmed[decided] = confirmed[new]
        self._cut[decided] = confirmed[new] - rule.window - (rule.consecutive - 1) * rule.stride
        some = n > 0
        self._streak[rows[some]] = streak[some, n[some] - 1]
        return np.where(new & ~self._probe[rows], at + 1, n)


def _columns(values: FloatArray, start: IntArray, width: int) -> FloatArray:
    """`values[i, start[i] : start[i] + width]` of every row."""
    if len(start) and (start == start[0]).all():
        return values[:, start[0] : start[0] + width]
    return np.take_along_axis(values, start[:, None] + np.arange(width), axis=1)


class KatTableRule(KatRule):
    """KAT's calibration, with rollouts followed together."""

    def begin_all(self, starts: Sequence[RolloutStart]) -> KatTable:
        """Start rollouts under the present threshold."""
        return KatTable(self._settings, self.threshold, [s.probe for s in starts])


def make(settings: KatParameters, facts: RunFacts) -> KatTableRule:
    """The rule that the settings describe."""
    return KatTableRule(settings)


KIND = RuleType(
    KatSettings, make, calibrates=True, by_windows=True, reads=(), sweep=values_to_try, warnings=settings_in_vain
)
