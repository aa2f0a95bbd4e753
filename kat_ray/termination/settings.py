"""Parameters that termination rules share, and those of the rule of the paper and of no rule.

Symbols and defaults are those of arXiv 2606.09471 where it gives them; the other defaults and the
reasons for them are in docs/termination.md. The other rules' parameters are in their own files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_WITHOUT_BUDGET = ("buffer", "min_samples", "min_steps")  # whose defaults depend on what sets the threshold


class RuleSettings(BaseModel):
    """Base of all rules' settings. A rule declares `rule: Literal["name"] = "name"`."""

    rule: str

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class NoneSettings(RuleSettings):
    """No rollout is cut; d's are still scored and recorded."""

    rule: Literal["none"] = "none"


class CuttingSettings(RuleSettings):
    """Base of the settings of rules that cut."""

    probe_share: float = Field(0.1, ge=0, le=1)
    """Share of rollouts that are never cut: they show what a cut would have removed."""


class KatParameters(CuttingSettings):
    """What the KAT rule and its variants are told."""

    window: int = Field(64, ge=1)
    """W, tokens: z(e) is the mean reverse KL of the last W tokens."""
    stride: int = Field(1, ge=1)
    """Tokens between two windows that are checked."""
    consecutive: int = Field(4, ge=1)
    """C: consecutive low windows that confirm a trap."""
    eta: float = Field(0.3, gt=0, lt=1)
    """The threshold is the (1 - eta) quantile of recent minima: a smaller eta cuts more."""
    budget: float | None = Field(None, ge=0, lt=1)
    """Share of a rollout's KL that cuts may remove, on average. With one the threshold is the largest that stays
    within it, by the rollouts in the buffer and a bound that pays for how few they are; `eta` does nothing then.
    Fewer than 1 / budget - 1 rollouts allow no cut."""
    buffer: int = Field(4096, ge=1)
    """Capacity of the FIFO of recent rollouts (of their minima; with a budget, of what cuts would remove)."""
    min_samples: int = Field(512, ge=1)
    """The rule is inactive until the buffer holds so many rollouts."""
    min_steps: int = Field(50, ge=0)
    """The rule is inactive in the first so many optimiser steps."""
    exempt: int = Field(128, ge=0)
    """Tokens at the start of a rollout that no checked window may reach into: e - W >= exempt."""
    calibrate_on: Literal["probes", "all", "finished"] = "probes"
    """Who feeds the buffer once the rule is active: `probes` (unbiased), `all` (a cut rollout counts with its
    minimum so far), `finished` (only uncut ones; the threshold can run away). With a budget `probes`, which alone
    show what a cut removes. While the rule is inactive nothing is cut, and every rollout feeds the buffer."""

    @model_validator(mode="after")
    def _can_become_active_and_stay_calibrated(self) -> Self:
        if self.min_samples > self.buffer:
            raise ValueError(
                f"min_samples = {self.min_samples}: must be <= buffer = {self.buffer}, or the rule never acts"
            )
        if self.calibrate_on == "probes" and self.probe_share == 0:
            raise ValueError("probe_share = 0: must be > 0 with calibrate_on = probes, which feeds on probes only")
        if self.budget is not None and self.calibrate_on != "probes":
            raise ValueError(
                f"calibrate_on = {self.calibrate_on}: must be probes with a budget, since a rollout that was cut "
                "does not show what the cut removed"
            )
        if self.budget and self.buffer < 1 / self.budget - 1:
            raise ValueError(
                f"buffer = {self.buffer}: must be >= {math.ceil(1 / self.budget - 1)} (1 / budget - 1) with budget "
                f"= {self.budget:g}, or nothing is ever cut"
            )
        return self


def with_threshold_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a KAT rule: where they name `eta` and no budget, there is none, since it would outrule eta."""
    return {"budget": None, **changes} if "eta" in changes else dict(changes)


class KatSettings(KatParameters):
    """KL Agreement Trap Termination (arXiv 2606.09471), with a budget where `eta` is not given.

    With an `eta` or another `calibrate_on` than probes, and no budget, or with `budget: null`, the threshold is the
    paper's quantile; buffer, min_samples and min_steps are then by default the paper's too: 4096, 512 and 50.
    """

    rule: Literal["kat"] = "kat"
    budget: float | None = Field(0.03, ge=0, lt=1)
    """Share of a rollout's KL that cuts may remove, on average: the threshold is the largest that stays within it,
    by the rollouts in the buffer and a bound that pays for how few they are. Fewer than 1 / budget - 1 rollouts
    allow no cut. `null`: the paper's quantile."""
    buffer: int = Field(256, ge=1)
    """Capacity of the FIFO of what cuts would remove from recent rollouts (without a budget: of their minima)."""
    min_samples: int = Field(128, ge=1)
    """The rule is inactive until the buffer holds so many rollouts."""
    min_steps: int = Field(2, ge=0)
    """The rule is inactive in the first so many optimiser steps."""

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper_without_a_budget(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        paper = given.get("eta") is not None or given.get("calibrate_on", "probes") != "probes"
        taken = {"budget": None, **given} if paper else dict(given)
        if taken.get("budget", 0) is not None:
            return taken
        return {name: KatParameters.model_fields[name].default for name in _WITHOUT_BUDGET} | taken
