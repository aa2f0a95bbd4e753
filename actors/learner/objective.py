"""The loss term that the configuration names, and the pass before it that it may need."""

from __future__ import annotations

from functools import partial

from actors.learner.sequence_pass import SequencePass
from actors.learner.settings import LearnerSettings
from kat_ray.config import PolicyObjective
from kat_ray.config.objective import DistillationObjective
from kat_ray.losses.distillation import Distillation, Divergence
from kat_ray.losses.divergence import (
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from kat_ray.losses.given import WithGiven
from kat_ray.losses.policy import (
    Correction,
    PolicyAndDistillation,
    PolicyLoss,
    cispo_loss,
    clip_loss,
    gspo_loss,
    interval_weight,
    reinforce_loss,
    sequence_mask_weight,
    truncated_weight,
)
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.losses.term import LossTerm


def make_term(settings: LearnerSettings, step: int = 0) -> LossTerm:
    """Distillation, the policy's loss beside it, or that alone, with its weights after `step` steps; with those of
    given completions, where there are any.
    """
    opd, rl = settings.objective.opd, settings.objective.rl
    weights, given = settings.objective.weights_at(step), settings.objective.off_policy
    if not settings.top_k:
        statistics = StudentStatistics(settings.stop_ids)
        alone = PolicyAndDistillation(statistics, _loss(rl), _correction(rl), 0.0, weights["rl"])
        return WithGiven(alone, None) if given.share else alone
    distillation = Distillation(settings.stop_ids, settings.eos, _divergence(opd), opd.student_temperature)
    if not (rl.weight or given.share) and opd.weight == 1.0 and not settings.objective.is_annealed:
        return distillation
    both = PolicyAndDistillation(distillation, _loss(rl), _correction(rl), weights["opd"], weights["rl"])
    if given.share:
        return WithGiven(both, distillation if given.loss == "distillation" else None)
    return both


def sequence_pass(settings: LearnerSettings) -> SequencePass | None:
    """What has to be known of whole rollouts before their tokens have a loss; None where nothing has."""
    kind = settings.objective.rl.rollout_ratio
    return SequencePass(kind, settings.stop_ids) if kind else None


def _divergence(opd: DistillationObjective) -> Divergence:
    match opd.divergence:
        case "reverse":
            return reverse_kl
        case "forward":
            return forward_kl
        case "jsd":
            return partial(generalised_jsd, beta=opd.beta)
        case "skewed_forward":
            return partial(skewed_forward_kl, alpha=opd.skew_alpha)
        case "skewed_reverse":
            return partial(skewed_reverse_kl, alpha=opd.skew_alpha)


def _loss(rl: PolicyObjective) -> PolicyLoss:
    low, high = rl.clip
    match rl.loss:
        case "clip":
            return lambda logp, anchor, a, _: clip_loss(logp, anchor, a, low, high, rl.dual_clip)
        case "cispo":
            return lambda logp, anchor, a, _: cispo_loss(logp, anchor, a, low, high)
        case "gspo":
            return lambda logp, _, a, sequence: gspo_loss(logp, sequence, a, low, high)
        case "reinforce":
            return lambda logp, _, a, __: reinforce_loss(logp, a)


def _correction(rl: PolicyObjective) -> Correction | None:
    low, high = rl.correction_range
    match rl.correction:
        case "truncate":
            return lambda log_ratio, _: truncated_weight(log_ratio, high)
        case "interval":
            return lambda log_ratio, _: interval_weight(log_ratio, low, high)
        case "sequence_mask":
            return lambda _, sequence: interval_weight(sequence, 0.0, high)
        case "geometric_mask":
            return lambda log_ratio, sequence: (
                sequence_mask_weight(sequence, low, high) * truncated_weight(log_ratio, high)
            )
        case "none":
            return None
