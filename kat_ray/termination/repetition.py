"""A rollout that repeats itself word for word is cut: it tells a loop from a trap.

    y_i       : generated token i; e: tokens seen so far                                           [tokens]
    loop(p, e): y_i = y_{i-p} for all i in [e - p * (repeats - 1), e)    p from min_period to max_period
    confirmed = first e at which some loop(p, e) holds; p the shortest of those
    cut       = e - p * (repeats - 1): the first token of the second repetition                    [tokens]

Source: none; a control of this project, of the kind that serving engines bring as repetition detection.

For each period p a counter holds for how many tokens the rollout has been equal to itself p tokens before; a
loop is p * (repeats - 1) of them in a row. O(max_period) work per token. KL is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, model_validator

from kat_ray.termination.base import Cut, NewTokens, RolloutStart, RunFacts
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import UncalibratedRule
from kat_ray.types import IntArray


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

    __slots__ = ("_equal", "_last", "_periods", "_settings", "cut", "seen")

    threshold: float | None = None
    minimum: float | None = None
    weights: Sequence[float] | None = None

    def __init__(self, settings: RepetitionSettings) -> None:
        self._settings = settings
        self._periods = np.arange(settings.min_period, settings.max_period + 1)
        self._last = np.full(settings.max_period, -1, dtype=np.int64)  # -1 is no token: it is equal to none
        self._equal = np.zeros(len(self._periods), dtype=np.int64)
        self.cut: Cut | None = None
        self.seen = 0

    def observe(self, tokens: NewTokens) -> Cut | None:
        """Take the next tokens."""
        if self.cut is None and len(tokens.token_ids):
            self._look(tokens.token_ids)
        self.seen += len(tokens.token_ids)
        return self.cut

    def _look(self, token_ids: IntArray) -> None:
        """All new tokens at all periods at once, [n, periods]."""
        rule = self._settings
        both = np.concatenate([self._last, token_ids])
        windows = sliding_window_view(both, rule.max_period + 1)  # the last of a row is the token itself
        equal = windows[:, -1 - self._periods] == windows[:, -1:]
        index = np.arange(len(token_ids))[:, None]
        differed = np.maximum.accumulate(np.where(equal, -1, index), axis=0)  # -1: not since the chunk began
        run = np.where(differed < 0, index + 1 + self._equal, index - differed)
        is_loop = run >= self._periods * (rule.repeats - 1)
        if is_loop.any():
            first = int(is_loop.any(axis=1).argmax())
            period = int(self._periods[is_loop[first].argmax()])  # the shortest
            confirmed = self.seen + first + 1
            self.cut = Cut(at=confirmed - period * (rule.repeats - 1), confirmed=confirmed)
        self._last, self._equal = both[-rule.max_period :], run[-1]


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
