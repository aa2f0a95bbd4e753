"""What a step tells of the student where no teacher is compared with it: counted, and no part of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kat_ray.losses.term import StudentLogprobs, TermSums, TokenRows


@dataclass(frozen=True)
class StudentStatistics:
    """Stands beside the policy's loss where `Distillation` does with a teacher; its loss is 0.

    Over the tokens of the policy's loss: |log p learner - log p sampler| of the sampled token, as there; the mass
    of the stop ids; and -log p of the sampled token, whose mean is an estimate of the whole distribution's entropy
    as long as the learner is the policy that sampled. None of them costs a pass over the vocabulary.
    """

    stop_ids: tuple[int, ...]  # the student's

    sum_names: ClassVar[tuple[str, ...]] = ("tokens", "logprob_diff", "entropy", "stop_mass")
    max_names: ClassVar[tuple[str, ...]] = ("logprob_diff",)

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """See `LossTerm`; top k there is none, so all stop ids lie outside it."""
        sampled = student.sampled
        finite = torch.isfinite(sampled)
        loss = torch.where(finite, sampled, 0).sum() * 0.0  # with a gradient, of 0
        with torch.no_grad():
            counts = torch.zeros_like(finite) if rows.policy_weights is None else rows.policy_weights > 0
            diff = (sampled - rows.sampled_logprobs).abs()
            diff = torch.where(torch.isfinite(diff) & counts, diff, 0)
            columns = (torch.ones_like(sampled), diff, -sampled, student.stop.exp())
            sums = torch.stack([torch.where(counts, c, 0).double().sum() for c in columns])
            largest = torch.cat([diff, diff.new_zeros(1)]).amax(dim=0, keepdim=True)
        return TermSums(loss, sums, largest)
