"""A rollout that repeats itself word for word is cut: it tells a loop from a trap.

    y_i       : generated token i; e: tokens seen so far                                           [tokens]
    loop(p, e): y_i = y_{i-p} for all i in [e - p * (repeats - 1), e)    p from min_period to max_period
    confirmed = first e at which some loop(p, e) holds; p the shortest of those
    cut       = e - p * (repeats - 1): the first token of the second repetition                    [tokens]

Source: none; a control of this project, of the kind that serving engines bring as repetition detection.

For each period p a counter holds for how many tokens the rollout has been equal to itself p tokens before; a
loop is p * (repeats - 1) of them in a row. O(max_period) work per token. KL plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, model_validator

from kat_ray.termination.base import Cut, NewTokens, RolloutStart, RuleType, RunFacts, RunScale
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.uncalibrated import UncalibratedRule
from kat_ray.types.records import IntArray


class RepetitionSettings(CuttingSettings):
    """Rollouts that repeat an n-gram are cut."""

    rule: Literal["repetition"] = "repetition"
    min_period: int = Field(1, ge=1)
    """Shortest n-gram that counts, tokens."""
    max_period: int = Field(64, ge=1)
    """Longest n-gram that is searched for, tokens."""
    repeats: int = Field(4, ge=2)
    """Times that the n-gram must occur in a row."""

    @model_validator(mode="after")
    def _periods_in_order(self) -> RepetitionSettings:
        if self.min_period > self.max_period:
            raise ValueError(f"min_period = {self.min_period}: must be <= max_period = {self.max_period}")
        return self


class RepetitionTracker:
    """One rollout's last tokens, and how long it has been repeating them at each period."""

    __slots__ = ("_equal", "_last", "_needed", "_settings", "cut", "seen")

    threshold: float | None = None
    minimum: float | None = None
    weights: Sequence[float] | None = None

    def __init__(self, settings: RepetitionSettings) -> None:
        self._settings = settings
        periods = np.arange(settings.min_period, settings.max_period + 1, dtype=np.int32)
        self._needed = periods * (settings.repeats - 1)
        self._last = np.full(settings.max_period, -1, dtype=np.int32)  # -1 is no token: it is equal to none
        self._equal = np.zeros(len(periods), dtype=np.int32)
        self.cut: Cut | None = None
        self.seen = 0

    def observe(self, tokens: NewTokens) -> Cut | None:
        if self.cut is None and len(tokens.token_ids):
            self._count(tokens.token_ids)
        self.seen += len(tokens.token_ids)
        return self.cut

    def _count(self, token_ids: IntArray) -> None:
        """All new tokens at all periods at once, [periods, n]."""
        rule, n = self._settings, len(token_ids)
        both = np.concatenate([self._last, token_ids])
        shifted = sliding_window_view(both, n)[: rule.max_period]
        before = shifted[::-1][rule.min_period - 1 :]  # a row a period: the tokens that many places before
        equal = before == both[rule.max_period :]
        index = np.arange(n, dtype=np.int32)
        differed = np.maximum.accumulate(np.where(equal, np.int32(-1), index), axis=1)  # -1: not in this chunk
        run = index - differed
        np.add(run, self._equal[:, None], out=run, where=differed < 0)
        is_loop = run >= self._needed[:, None]
        if is_loop.any():
            first = int(is_loop.any(axis=0).argmax())
            needed = int(self._needed[is_loop[:, first].argmax()])  # of the shortest period
            confirmed = self.seen + first + 1
            self.cut = Cut(at=confirmed - needed, confirmed=confirmed)
        self._last, self._equal = both[-rule.max_period :], run[:, -1].copy()


class RepetitionRule(UncalibratedRule):
    """Nothing is shared between rollouts."""

    def __init__(self, settings: RepetitionSettings) -> None:
        self._settings = settings

    def begin(self, start: RolloutStart) -> RepetitionTracker:
        return RepetitionTracker(self._settings)


def make(settings: RepetitionSettings, facts: RunFacts) -> RepetitionRule:
    """The rule that the settings describe."""
    return RepetitionRule(settings)


def _warnings(settings: RepetitionSettings, run: RunScale) -> Iterator[str]:
    shortest = settings.min_period * settings.repeats
    if shortest > run.max_tokens:
        yield (
            f"min_period x repeats = {shortest} tokens > rollout.max_tokens = {run.max_tokens}: no loop is ever "
            "complete, nothing will be cut"
        )


KIND = RuleType(
    RepetitionSettings,
    make,
    reads=("token_ids",),
    sweep=lambda settings, max_tokens: {"repeats": [2, 3, 4, 6, 8]},
    warnings=_warnings,
)
