"""The ablation of KAT's stages (arXiv 2606.09471): the tokens it removes are put back into the loss.

The KAT rule runs as ever, but ends no rollout. Its decisions become weights:

    before     [0, cut)         weight 1
    agreement  [cut, end)       weight 1 if it is put back, else 0; end: the token that lifts the window mean to the
                                threshold again, or the rollout's end
    after      [end, length)    weight 1 if it is put back, else 0

A token of weight 0 is not in the loss and not in its mean, so with `calibrate_on: probes` `put_back: nothing`
trains on exactly what `kat` would. With `all` or `finished` it does not: rollouts go on to their end here, and the
whole minimum of every one feeds the buffer, which `kat` never sees of those it cuts. Nothing is saved by this rule.
Probes are trained on in full, as with `kat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from kat_ray.termination.base import Cut, Effect, NewTokens, RolloutStart, RuleType, RunFacts
from kat_ray.termination.kat import KatRule, KatTracker, settings_in_vain, values_to_try
from kat_ray.termination.settings import KatParameters
from kat_ray.termination.staircase import Staircase


class KatStagesSettings(KatParameters):
    """KAT without ending rollouts: stages it would remove are left out of the loss, or put back."""

    rule: Literal["kat_stages"] = "kat_stages"
    put_back: Literal["nothing", "agreement", "after"] = Field("nothing")
    """The stage that is trained on although KAT would have removed it."""


class StagesTracker:
    """One rollout, followed to its end, with the stages that the KAT rule divides it into."""

    __slots__ = ("_kat", "_probe", "_settings")

    def __init__(self, settings: KatStagesSettings, threshold: float | None, probe: bool) -> None:
        self._settings = settings
        self._probe = probe
        self._kat = KatTracker(settings, threshold, probe=True)

    @property
    def threshold(self) -> float | None:
        return self._kat.threshold

    @property
    def cut(self) -> Cut | None:
        """What the rule says of a probe; no other rollout is cut."""
        return self._kat.cut if self._probe else None

    @property
    def minimum(self) -> float | None:
        """m(y) of the whole rollout, nats."""
        return self._kat.minimum

    @property
    def seen(self) -> int:
        return self._kat.seen

    @property
    def evidence(self) -> Staircase | None:
        return self._kat.evidence if self._probe or self.threshold is None else None

    @property
    def weights(self) -> Sequence[float] | None:
        """1 for tokens that are trained on, 0 for those left out."""
        cut = self._kat.cut
        if cut is None or self._probe:
            return None
        end = self.seen if self._kat.recovered is None else self._kat.recovered
        agreement = 1.0 if self._settings.put_back == "agreement" else 0.0
        after = 1.0 if self._settings.put_back == "after" else 0.0
        return [1.0] * cut.at + [agreement] * (end - cut.at) + [after] * (self.seen - end)

    def observe(self, tokens: NewTokens) -> Cut | None:
        self._kat.observe(tokens)
        return self.cut


class StagesRule(KatRule):
    """KAT's calibration, with trackers that end nothing."""

    def __init__(self, settings: KatStagesSettings) -> None:
        super().__init__(settings)
        self._stages = settings

    def begin(self, start: RolloutStart) -> StagesTracker:
        """Start a rollout under the present threshold."""
        return StagesTracker(self._stages, self.threshold, start.probe)


def make(settings: KatStagesSettings, facts: RunFacts) -> StagesRule:
    """The rule that the settings describe."""
    return StagesRule(settings)


KIND = RuleType(
    KatStagesSettings,
    make,
    Effect.WEIGHS,
    calibrates=True,
    by_windows=True,
    reads=(),
    sweep=values_to_try,
    warnings=settings_in_vain,
)
