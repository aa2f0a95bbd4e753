"""Many rollouts followed together: what the monitor holds of a step.

A chunk brings a few tokens of each of hundreds of rollouts. A rule that offers `begin_all` takes them all in a few
array operations; of any other rule each rollout has its own tracker, which sees the same values in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kat_ray.termination.base import Cut, NewTokens, RolloutStart, RolloutTracker, TerminationRule
from kat_ray.types.records import FloatArray, IntArray


@dataclass(frozen=True)
class TrackerState:
    """What is known of one rollout; the fields are those of a `RolloutTracker`."""

    threshold: float | None
    cut: Cut | None
    minimum: float | None
    weights: Sequence[float] | None = None
    evidence: Any = None  # for the rule's calibration, where it asks for more than the minimum


class RolloutTable(Protocol):
    """The trackers of a step's rollouts, one a row."""

    def observe(
        self, rows: IntArray, tokens: NewTokens, first: IntArray, count: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Take the next tokens of `rows` [R], each row once: of row i `tokens[first[i] : first[i] + count[i]]`.

        Returns the rows' cuts and confirmations [R], tokens; -1 where nothing is decided.
        """

    def tracker_state(self, row: int) -> TrackerState:
        """What is known of a row now."""


@runtime_checkable
class TableRule(Protocol):
    """A rule that follows rollouts together. Its outcomes are to the bit those of its trackers."""

    def begin_all(self, starts: Sequence[RolloutStart]) -> RolloutTable:
        """Start rollouts under the present threshold, in the order of rows."""


class TrackerTable:
    """A table of trackers, one call a rollout."""

    def __init__(self, trackers: Sequence[RolloutTracker]) -> None:
        self._trackers = trackers

    def observe(
        self, rows: IntArray, tokens: NewTokens, first: IntArray, count: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Pass each row's tokens to its tracker."""
        cuts, confirmed = np.full(len(rows), -1), np.full(len(rows), -1)
        for i, (row, start, n) in enumerate(zip(rows.tolist(), first.tolist(), count.tolist(), strict=True)):
            columns: list[Any] = [column[start : start + n] for column in tokens]
            if (cut := self._trackers[row].observe(NewTokens(*columns))) is not None:
                cuts[i], confirmed[i] = cut.at, cut.confirmed
        return cuts, confirmed

    def tracker_state(self, row: int) -> TrackerState:
        """What the row's tracker says."""
        tracker = self._trackers[row]
        evidence = getattr(tracker, "evidence", None)  # an addition: trackers of other packages may lack it
        return TrackerState(tracker.threshold, tracker.cut, tracker.minimum, tracker.weights, evidence)


def make_table(rule: TerminationRule, starts: Sequence[RolloutStart]) -> RolloutTable:
    """The fastest table that a rule has for these rollouts."""
    if isinstance(rule, TableRule):
        return rule.begin_all(starts)
    return TrackerTable([rule.begin(start) for start in starts])


def padded(kl: FloatArray, first: IntArray, count: IntArray) -> FloatArray:
    """Rows `kl[first[i] : first[i] + count[i]]` side by side, [R, max(count)] float64, NaN after a row's end."""
    width = int(count.max(initial=0))
    column = np.arange(width)
    if not len(kl):
        return np.zeros((len(count), 0))
    values = kl[np.minimum(first[:, None] + column, len(kl) - 1)].astype(np.float64)
    if len(count) and int(count.min()) < width:
        values[column >= count[:, None]] = np.nan
    return values
