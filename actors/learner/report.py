"""What an optimiser step gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kat_ray.losses.coverage import hidden_kl
from kat_ray.run.step_result import LearnerReport


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


def report_of(step: OptimizerStep, policy_version: int, seconds: float) -> LearnerReport:
    """The means of a step of `Distillation`."""
    sums, skipped = step.sums, not math.isfinite(step.grad_norm)
    count = max(sums["tokens"], 1.0)
    coverage = (sums[name] / count for name in ("kl", "tail_mass", "coarser_kl", "coarser_tail_mass"))
    return LearnerReport(
        policy_version=policy_version,
        loss=math.nan if skipped and not sums["tokens"] else step.loss / max(sums["weight"], 1e-9),
        grad_norm=step.grad_norm,
        lr=step.lr,
        tokens=int(sums["tokens"]),
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
    )
