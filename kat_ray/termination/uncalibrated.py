"""What rules without a calibration share: they take one rollout at a time and learn nothing from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kat_ray.termination.base import Cut, Finished, NewTokens, RolloutStart
from kat_ray.termination.state import RuleState, read_state

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class LengthTracker:
    """Cuts a rollout at a length fixed when it starts; None never cuts.

    The decision falls with the first token after that length: a rollout that ends there by itself is not cut.
    """

    __slots__ = ("_length", "cut", "seen")

    threshold: float | None = None
    minimum: float | None = None
    weights: Sequence[float] | None = None

    def __init__(self, length: int | None) -> None:
        self._length = length
        self.cut: Cut | None = None
        self.seen = 0

    def observe(self, tokens: NewTokens) -> Cut | None:
        self.seen += len(tokens.d)
        if self.cut is None and self._length is not None and self.seen > self._length:
            self.cut = Cut(at=self._length, confirmed=self._length + 1)
        return self.cut


class UncalibratedRule:
    """A rule that learns nothing from the rollouts that ended."""

    threshold: float | None = None
    samples: int = 0
    budget: int | None = None

    def start_step(self, step: int) -> None:
        """Nothing to fix."""

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Nothing to learn from."""

    def state(self) -> dict[str, Any]:
        """Nothing to remember: what depends on the step is fixed when it starts."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""
        read_state(RuleState, state)


class LengthRule(UncalibratedRule):
    """Rollouts are cut at `length(start, step)`."""

    def __init__(self, length: Callable[[RolloutStart, int], int | None]) -> None:
        self._length = length
        self._step = 0

    def start_step(self, step: int) -> None:
        """Remember the step: a rule may change with it."""
        self._step = step

    def begin(self, start: RolloutStart) -> LengthTracker:
        return LengthTracker(self._length(start, self._step))


def shares_of(max_tokens: int) -> list[int]:
    """Lengths for a replay to try: a tenth of `rollout.max_tokens`, two tenths, ... nine."""
    return sorted({max(1, round(max_tokens * share)) for share in _SHARES})
