"""Prune-OPD (arXiv 2605.07804): tokens after a drift from the teacher weigh less, and rollouts become shorter.

    bad_t    = overlap_t < level             overlap_t: share of the student's top-16 ids among the teacher's
    w_t      = clip(1 - decay * sum_{i<=t} bad_i, 0, 1)                     weight of token t in the loss
    cut      = first t with w_t = 0: nothing after it counts                [tokens]
    budget   : + growth when at least `full_share` of a step's rollouts fill it, - growth after `patience` steps in
               a row without that; between `shortest` and rollout.max_tokens [tokens]

It is the opposite of KAT in what it distrusts: low overlap, not low KL. Where the overlap is not known, a token is
not bad. The paper's figures are the defaults, but for two that are not known to us: by how much the budget shrinks,
taken to be `growth`, and how far, where `shortest` = 64 is our assumption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from kat_ray.termination.base import Cut, Finished, NewTokens, RolloutStart, RuleType, RunFacts, RunScale
from kat_ray.termination.settings import CuttingSettings
from kat_ray.termination.state import BudgetState, read_state


class PruneSettings(CuttingSettings):
    """Weights that fall with every token of low overlap, and a length budget for the batch."""

    rule: Literal["prune_opd"] = "prune_opd"
    level: float = Field(0.7, ge=0, le=1)
    """Overlap of the two models' top-16 ids below which a token is bad, share."""
    decay: float = Field(0.01, gt=0, le=1)
    """What each bad token takes from the weight of all that follow it."""
    start: int | None = Field(None, ge=1)
    """Length budget of the first step, tokens; null takes rollout.max_tokens."""
    growth: int = Field(100, ge=0)
    """Tokens by which the budget grows or shrinks; 0 keeps it."""
    full_share: float = Field(0.1, ge=0, le=1)
    """Share of a step's rollouts that must fill the budget for it to grow."""
    patience: int = Field(3, ge=1)
    """Steps in a row without that after which it shrinks."""
    shortest: int = Field(64, ge=1)
    """The budget never falls below it, tokens; the default is an assumption of ours, not the paper's."""


class PruneTracker:
    """One rollout's weights."""

    __slots__ = ("_bad", "_settings", "cut", "weights")

    threshold: float | None = None
    minimum: float | None = None

    def __init__(self, settings: PruneSettings) -> None:
        self._settings = settings
        self._bad = 0
        self.weights: list[float] = []
        self.cut: Cut | None = None

    @property
    def seen(self) -> int:
        return len(self.weights)

    def observe(self, tokens: NewTokens) -> Cut | None:
        overlap = tokens.overlap.tolist() or [1.0] * len(tokens.d)
        for share in overlap:
            self._bad += share < self._settings.level  # false for NaN
            weight = max(0.0, 1.0 - self._settings.decay * self._bad)
            if weight < 1e-9:  # 1 - 100 * 0.01 is not quite 0
                weight = 0.0
                if self.cut is None:
                    self.cut = Cut(at=len(self.weights), confirmed=len(self.weights) + 1)
            self.weights.append(weight)
        return self.cut


class PruneRule:
    """The length budget that rollouts share."""

    threshold: float | None = None
    samples: int = 0

    def __init__(self, settings: PruneSettings, max_tokens: int) -> None:
        self._settings = settings
        self._max_tokens = max_tokens
        self._misses = 0
        self.budget: int | None = min(settings.start or max_tokens, max_tokens)

    def start_step(self, step: int) -> None:
        """The budget was set when the step before ended."""

    def begin(self, start: RolloutStart) -> PruneTracker:
        return PruneTracker(self._settings)

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Move the budget by how many rollouts filled it; probes do not count, they have none."""
        rule, bound = self._settings, [f for f in finished if not f.probe]
        if not bound or self.budget is None:
            return
        if sum(f.full for f in bound) >= rule.full_share * len(bound):
            self._misses = 0
            self.budget = min(self._max_tokens, self.budget + rule.growth)
        else:
            self._misses += 1
            if self._misses == rule.patience:
                self._misses = 0
                self.budget = max(min(rule.shortest, self._max_tokens), self.budget - rule.growth)

    def state(self) -> dict[str, Any]:
        """The budget, and the steps in a row that did not fill it."""
        return BudgetState(budget=self.budget, misses=self._misses).model_dump()

    def load_state(self, state: Mapping[str, Any]) -> None:
        saved = read_state(BudgetState, state)
        self.budget, self._misses = saved.budget, saved.misses


def make(settings: PruneSettings, facts: RunFacts) -> PruneRule:
    """The rule that the settings describe."""
    return PruneRule(settings, facts.max_tokens)


def _warnings(settings: PruneSettings, run: RunScale) -> Iterator[str]:
    if settings.start is not None and settings.start > run.max_tokens:
        yield (f"start = {settings.start} > rollout.max_tokens = {run.max_tokens}: the budget starts at the latter")


KIND = RuleType(
    PruneSettings,
    make,
    reads=("overlap",),
    needs=("overlap",),
    sweep=lambda settings, max_tokens: {"level": [0.5, 0.6, 0.7, 0.8, 0.9], "decay": [0.01, 0.02, 0.05]},
    warnings=_warnings,
)
