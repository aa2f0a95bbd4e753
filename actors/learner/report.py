"""What an optimiser step gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kat_ray.losses.coverage import hidden_kl
from kat_ray.run.step_result import GivenReport, LearnerReport, PolicyReport


@dataclass(frozen=True)
class OptimizerStep:
    """One optimiser step, over all ranks."""

    loss: float  # the sum over tokens of what the term is; not yet a mean
    sums: Mapping[str, float]  # by `LossTerm.sum_names`
    maxima: Mapping[str, float]  # by `LossTerm.max_names`
    grad_norm: float  # before clipping; inf where the step was skipped
    lr: float
    micro_batches: int  # forward and backward passes of each rank
    top_k_for_99: int | None = None  # how long a top k holds 99 % of the student's mass
    weight: float = 1.0  # what the loss was divided by


def policy_report(step: OptimizerStep) -> PolicyReport | None:
    """What the policy's loss came to; None where no token is in it, unless it is all there is."""
    sums = step.sums
    if not sums.get("policy_tokens") and "kl" in sums:
        return None
    count = max(sums["policy_tokens"], 1.0)
    ratio, squared = sums["ratio"] / count, sums["ratio_squared"] / count
    return PolicyReport(
        loss=sums["policy_loss"] / (step.weight or 1.0),
        tokens=int(sums["policy_tokens"]),
        ratio_mean=ratio,
        ratio_max=step.maxima["ratio"],
        effective_share=ratio**2 / squared if squared else 1.0,
        clip_low_share=sums["clipped_low"] / count,
        clip_high_share=sums["clipped_high"] / count,
        masked_share=sums["masked"] / count,
        log_ratio_max=step.maxima["log_ratio"],
        entropy=sums["policy_entropy"] / count,
        grad_share=sums["policy_pull"] / (sums["policy_pull"] + sums["kl_pull"]) if sums["kl_pull"] else None,
        grad_cosine=_cosine(sums),
    )


def report_of(
    step: OptimizerStep,
    policy_version: int,
    seconds: float,
    weights: Mapping[str, float] | None = None,
    distils: bool = True,
) -> LearnerReport:
    """The means of a step of `Distillation`, and of the policy beside it; `weights` of both, where they change.

    Without `distils` the KL is measured, and no part of the loss: nor are its tokens.
    """
    sums, skipped = step.sums, not math.isfinite(step.grad_norm)
    if "kl" not in sums:
        return replace(_of_the_policy(step, policy_version, seconds, weights), given=given_report(step))
    count = max(sums["tokens"], 1.0)
    kl = sums.get("kl_loss", step.loss)
    coverage = (sums[name] / count for name in ("kl", "tail_mass", "coarser_kl", "coarser_tail_mass"))
    return LearnerReport(
        policy_version=policy_version,
        loss=math.nan if skipped and not sums["tokens"] else kl / max(sums["weight"], 1e-9),
        grad_norm=step.grad_norm,
        lr=step.lr,
        tokens=int(sums["tokens"] if distils else sums["policy_tokens"]),
        dropped_tokens=int(sums["dropped"]),
        logprob_diff_mean=sums["logprob_diff"] / count,
        logprob_diff_max=step.maxima["logprob_diff"],
        entropy=sums["entropy"] / count,
        tail_mass=sums["tail_mass"] / count,
        kl_hidden=hidden_kl(*coverage),
        top_k_for_99=step.top_k_for_99,
        stop_mass=sums["stop_mass"] / count,
        micro_batches=step.micro_batches,
        seconds=seconds,
        skipped=skipped,
        policy=policy_report(step),
        weights=weights,
        given=given_report(step),
    )


def _cosine(sums: Mapping[str, float]) -> float | None:
    """Between the two losses' gradients in the logits of events; None where one of them is 0."""
    norms = math.sqrt(sums["policy_gradient_squared"]) * math.sqrt(sums["kl_gradient_squared"])
    return sums["gradient_product"] / norms if norms else None


def given_report(step: OptimizerStep) -> GivenReport | None:
    """What the given completions came to; None of a step without any."""
    sums = step.sums
    if not (sums.get("given_tokens") or sums.get("given_dropped")):
        return None
    tokens = max(sums["given_tokens"], 1.0)
    return GivenReport(
        tokens=int(sums["given_tokens"]),
        loss=sums["given_loss"] / (sums["given_weight"] or 1.0),
        nll=sums["given_nll"] / tokens,
        dropped_tokens=int(sums["given_dropped"]),
    )


def _of_the_policy(
    step: OptimizerStep, policy_version: int, seconds: float, weights: Mapping[str, float] | None
) -> LearnerReport:
    """The means of a step of `StudentStatistics` with the policy's loss."""
    policy, sums = policy_report(step), step.sums
    assert policy is not None, "without a teacher the policy's loss is all there is"
    count = max(sums["tokens"], 1.0)
    return LearnerReport(
        policy_version=policy_version,
        loss=policy.loss,
        grad_norm=step.grad_norm,
        lr=step.lr,
        tokens=policy.tokens,
        dropped_tokens=0,
        logprob_diff_mean=sums["logprob_diff"] / count,
        logprob_diff_max=step.maxima["logprob_diff"],
        entropy=sums["entropy"] / count,
        tail_mass=None,
        stop_mass=sums["stop_mass"] / count,
        micro_batches=step.micro_batches,
        seconds=seconds,
        skipped=not math.isfinite(step.grad_norm),
        policy=policy,
        weights=weights,
    )
