"""Termination rules: where a rollout is cut, from its reverse KL alone."""

from __future__ import annotations

from kat_ray.termination.base import Cut, Finished, RolloutTracker, TerminationRule
from kat_ray.termination.kat import KatRule
from kat_ray.termination.none import NoRule
from kat_ray.termination.settings import KatSettings, NoneSettings

__all__ = ["Cut", "Finished", "RolloutTracker", "TerminationRule", "make_rule"]


def make_rule(settings: KatSettings | NoneSettings) -> TerminationRule:
    """The rule that the settings describe, with an empty calibration."""
    match settings:
        case KatSettings():
            return KatRule(settings)
        case NoneSettings():
            return NoRule()
