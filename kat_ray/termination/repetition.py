"""A rollout that repeats itself word for word is cut: it tells a loop from a trap.

    loop of period p: the last p * repeats tokens are the same p tokens, `repeats` times
    cut = first token of the second repetition                                       [tokens]

For each period p a counter holds for how many tokens the rollout has been equal to itself p tokens before; a
loop is p * (repeats - 1) of them in a row. O(max_period) work per token. KL is not looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from kat_ray.termination.base import Cut, NewTokens, RolloutStart, RunFacts
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import UncalibratedRule


class RepetitionSettings(CuttingSettings):
    """Rollouts that repeat an n-gram are cut."""

    rule: Literal["repetition"] = "repetition"
    min_period: int = Field(1, ge=1)
    """Shortest n-gram that counts, tokens."""
    max_period: int = Field(64, ge=1)
    """Longest n-gram that is looked for, tokens."""
    repeats: int = Field(4, ge=2)
    """Times that the n-gram stands in a row."""

    @model_validator(mode="after")
    def _periods_in_order(self) -> RepetitionSettings:
        if self.min_period > self.max_period:
            raise ValueError(f"min_period = {self.min_period}: must be <= max_period = {self.max_period}")
        return self


class RepetitionTracker:
    """One rollout's last tokens, and how long it has been repeating them at each period."""

    __slots__ = ("_equal", "_last", "_settings", "cut", "seen")

    threshold: float | None = None
    minimum: float | None = None
    weights: Sequence[float] | None = None

    def __init__(self, settings: RepetitionSettings) -> None:
        self._settings = settings
        self._last: deque[int] = deque(maxlen=settings.max_period)
        self._equal = [0] * (settings.max_period + 1)
        self.cut: Cut | None = None
        self.seen = 0

    def observe(self, tokens: NewTokens) -> Cut | None:
        """Take the next tokens."""
        for token in tokens.token_ids.tolist():
            self.seen += 1
            if self.cut is None:
                self._look(token)
        return self.cut

    def _look(self, token: int) -> None:
        rule = self._settings
        for period in range(rule.min_period, len(self._last) + 1):
            same = self._last[-period] == token
            self._equal[period] = self._equal[period] + 1 if same else 0
            if self.cut is None and self._equal[period] >= period * (rule.repeats - 1):
                self.cut = Cut(at=self.seen - period * (rule.repeats - 1), confirmed=self.seen)
        self._last.append(token)


class RepetitionRule(UncalibratedRule):
    """Nothing is shared between rollouts."""

    def __init__(self, settings: RepetitionSettings) -> None:
        self._settings = settings

    def begin(self, start: RolloutStart) -> RepetitionTracker:
        """Start a rollout."""
        return RepetitionTracker(self._settings)


def make(settings: RepetitionSettings, facts: RunFacts) -> RepetitionRule:
    """The rule that the settings describe."""
    return RepetitionRule(settings)
