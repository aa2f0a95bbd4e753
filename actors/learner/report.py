"""What an optimiser step gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """One optimiser step, over all ranks."""

    loss: float  # the sum over tokens of what the term is; not yet a mean
    sums: Mapping[str, float]  # by `LossTerm.sum_names`
    maxima: Mapping[str, float]  # by `LossTerm.max_names`
    grad_norm: float  # before clipping; inf where the step was skipped
    lr: float
    micro_batches: int  # forward and backward passes of each rank


@dataclass(frozen=True)
class LearnerReport:
    """One optimiser step, summed over all ranks. `loss` is the (weighted) mean KL over the kept tokens, nats.

    A step is `skipped` if its loss or gradient is not finite, or none of its tokens has a finite KL: weights and
    optimiser stay as they were, to the bit, on all ranks. A step without kept tokens is not: nothing was wrong.
    """

    policy_version: int
    loss: float  # nan where tokens were kept and none has a finite KL
    grad_norm: float  # before clipping; inf where the step was skipped
    lr: float
    tokens: int  # tokens in the loss
    dropped_tokens: int  # kept, but without a finite KL
    logprob_diff_mean: float  # mean |log p learner - log p sampler| of the sampled tokens
    logprob_diff_max: float
    entropy: float  # nats, of the student's events
    tail_mass: float
    stop_mass: float
    micro_batches: int
    seconds: float
    skipped: bool

    @classmethod
    def from_step(cls, step: StepResult, policy_version: int, seconds: float) -> LearnerReport:
        """The means of a step of `Distillation`."""
        sums, skipped = step.sums, not math.isfinite(step.grad_norm)
        count = max(sums["tokens"], 1.0)
        return cls(
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
            stop_mass=sums["stop_mass"] / count,
            micro_batches=step.micro_batches,
            seconds=seconds,
            skipped=skipped,
        )
