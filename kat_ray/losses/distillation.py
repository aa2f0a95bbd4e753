"""On-policy distillation as a term of the loss: reverse KL or its like, with gradient through the student.

The gradient flows through the (k + 1)-way divergence itself. Putting the KL into a detached advantage, or
back-propagating the sampled token's log-ratio, has an expected gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kat_ray.losses.coverage import coarser_kl
from kat_ray.losses.divergence import entropy, event_logprobs, is_stop, log_add, reverse_kl, stop_logprob
from kat_ray.losses.eos import EosMode
from kat_ray.losses.term import StudentLogprobs, TermSums, TokenRows

# Of student and teacher [N, E], log-probabilities of events: [N], in nats.
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """Weighted sum over tokens of KL(student || teacher), or of another divergence of the two, in nats.

    A token whose divergence is not finite leaves value and gradient by mask and is counted as dropped.
    `logprob_diff` is |log p learner - log p sampler| of the sampled token; entropy and masses are the student's;
    the KL that is counted is the reverse one whatever is learnt, the coarser KL and tail mass are those of a
    quarter of the top k. The student is compared at `temperature`, as the rows have the teacher at its own; entropy
    and stop mass are at temperature 1.
    """

    stop_ids: tuple[int, ...]
    eos: EosMode
    divergence: Divergence = reverse_kl
    temperature: float = 1.0  # of the student

    sum_names: ClassVar[tuple[str, ...]] = (
        "tokens", "weight", "dropped", "logprob_diff", "entropy", "tail_mass", "stop_mass", "kl", "coarser_kl",
        "coarser_tail_mass",
    )  # fmt: skip
    max_names: ClassVar[tuple[str, ...]] = ("logprob_diff",)

    def __call__(self, student: StudentLogprobs, rows: TokenRows) -> TermSums:
        """See `LossTerm`."""
        stops = is_stop(rows.topk_ids, self.stop_ids)
        learnt = student.learnt
        own = event_logprobs(*learnt, stops, self.eos)
        teacher = event_logprobs(rows.teacher_topk, rows.teacher_tail, rows.teacher_stop, stops, self.eos)
        # A teacher's NaN must not meet the student's graph: 0 * NaN is NaN in the backward pass.
        usable = torch.isfinite(self.divergence(own.detach(), teacher))
        kl = self.divergence(own, torch.where(usable[:, None], teacher, own.detach()))
        counts = ~(rows.weights <= 0)  # a weight that is NaN counts: the loss shows it, and the step is skipped
        dropped, usable = ~usable & counts, usable & counts
        loss = torch.where(usable, rows.weights * kl, torch.zeros_like(kl)).sum()
        with torch.no_grad():
            diff = (student.sampled - rows.sampled_logprobs).abs()
            diff = torch.where(torch.isfinite(diff), diff, torch.zeros_like(diff))
            tail = log_add(learnt.tail, learnt.stop).exp()  # outside the top k
            stop = stop_logprob(student.topk, student.stop, stops).exp()
            given = (rows.teacher_topk, rows.teacher_tail, rows.teacher_stop)
            coarser = coarser_kl(learnt, given, stops, self.eos)
            if self.divergence is not reverse_kl:  # which need not be finite where another is
                kl = reverse_kl(own, teacher)
                seen = torch.isfinite(kl) & torch.isfinite(coarser[0])
                kl, coarser = torch.where(seen, kl, 0), (torch.where(seen, coarser[0], 0), coarser[1])
            plain = own
            if student.tempered is not None:
                plain = event_logprobs(student.topk, student.tail, student.stop, stops, self.eos)
            columns = (usable, rows.weights, diff, entropy(plain), tail, stop, kl, *coarser)
            tokens, weight, *means = (torch.where(usable, c, 0).double().sum() for c in columns)
            sums = torch.stack([tokens, weight, dropped.double().sum(), *means])
            largest = torch.cat([diff, diff.new_zeros(1)]).amax(dim=0, keepdim=True)
        return TermSums(loss, sums, largest)
