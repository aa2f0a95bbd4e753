"""Termination rules: where a rollout is cut, from its reverse KL and its tokens alone."""

from __future__ import annotations

from kat_ray.termination.base import (
    Cut,
    Effect,
    Finished,
    NewTokens,
    RolloutStart,
    RolloutTracker,
    RuleType,
    RunFacts,
    RunScale,
    TerminationRule,
)
from kat_ray.termination.registry import RULES, TerminationConfig, kat_parameters, make_rule
from kat_ray.termination.table import make_table

__all__ = [
    "RULES",
    "Cut",
    "Effect",
    "Finished",
    "NewTokens",
    "RolloutStart",
    "RolloutTracker",
    "RuleType",
    "RunFacts",
    "RunScale",
    "TerminationConfig",
    "TerminationRule",
    "kat_parameters",
    "make_rule",
    "make_table",
]
