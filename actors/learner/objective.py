"""The loss term that the configuration names."""

from __future__ import annotations

from functools import partial

from actors.learner.settings import LearnerSettings
from kat_ray.config import PolicyObjective
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.policy import (
    Correction,
    PolicyAndDistillation,
    PolicyLoss,
    cispo_loss,
    clip_loss,
    interval_weight,
    reinforce_loss,
    truncated_weight,
)
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.losses.term import LossTerm


def make_term(settings: LearnerSettings) -> LossTerm:
    """Distillation alone, the policy's loss beside it, or the policy's alone."""
    opd, rl = settings.objective.opd, settings.objective.rl
    if not settings.top_k:
        return PolicyAndDistillation(
            StudentStatistics(settings.stop_ids), _loss(rl), _correction(rl), 0.0, rl.weight
        )
    distillation = Distillation(settings.stop_ids, settings.eos)
    if not rl.weight and opd.weight == 1.0:
        return distillation
    return PolicyAndDistillation(distillation, _loss(rl), _correction(rl), opd.weight, rl.weight)


def _loss(rl: PolicyObjective) -> PolicyLoss:
    low, high = rl.clip
    match rl.loss:
        case "clip":
            return partial(clip_loss, low=low, high=high, dual=rl.dual_clip)
        case "cispo":
            return partial(cispo_loss, low=low, high=high)
        case _:
            return lambda logp, _, advantage: reinforce_loss(logp, advantage)


def _correction(rl: PolicyObjective) -> Correction | None:
    low, high = rl.correction_range
    match rl.correction:
        case "truncate":
            return partial(truncated_weight, cap=high)
        case "interval":
            return partial(interval_weight, low=low, high=high)
        case _:
            return None
