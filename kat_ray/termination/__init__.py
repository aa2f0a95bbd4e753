"""Termination rules: where a rollout is cut, from its reverse KL and its tokens alone."""

from __future__ import annotations

from kat_ray.termination.base import (
    Cut,
    Finished,
    NewTokens,
    RolloutStart,
    RolloutTracker,
    RuleType,
    RunFacts,
    TerminationRule,
)
from kat_ray.termination.registry import RULES, TerminationConfig, make_rule
from kat_ray.termination.table import make_table

__all__ = [
    "RULES",
    "Cut",
    "Finished",
    "NewTokens",
    "RolloutStart",
    "RolloutTracker",
    "RuleType",
    "RunFacts",
    "TerminationConfig",
    "TerminationRule",
    "make_rule",
    "make_table",
]
