"""Divergences on the (k + 1)-way partition that the student's top k and one tail bucket make; reverse KL above all.

KL(p || q) = sum_e p(e) (log p(e) - log q(e)) in nats, over events e: the student's k most likely tokens, each
on its own, and everything else as one. A partition coarsens the vocabulary, hence 0 <= this <= full-vocabulary
KL, with equality where p and q agree in proportion within the tail (arXiv 2606.09471, section on top-k KL). The
same holds of the forward KL, of the generalised Jensen-Shannon divergence and of the skewed KLs, by the same
inequality of data processing. Any ids make such a partition, also the teacher's own top k; and any two
distributions may be compared on it, also those of models at a temperature T, p(v)^(1/T) / sum_w p(w)^(1/T). Their
masses take the whole vocabulary: the mass of a tail at T does not follow from its mass at 1.

Stop ids (`eos`): `raw` leaves them singletons. `merged` turns the stop ids of both models, where one of them is
among the student's top k, into one STOP event on both sides; elsewhere they stay in the tail on both sides.
`mask` is `merged` with the STOP event left out and the rest renormalised.

A distribution travels as three kinds of masses that add up to 1: the top k, the stop ids outside them (`stop`), and
all other ids (`tail`). Each is a logsumexp over ids, so events are sums of them, and no small mass is a difference
of large ones: a teacher's log q of -40 is -40. Where an engine gives the top k only, their tail is 1 - sum(p),
whose rounding LOG_FLOOR bounds, and it holds the stop ids outside them too (`stop` is -inf). The student's side at
a scorer is such a one. A part s of its tail then belongs to STOP, and the KL exceeds that of the true events, hence
maybe the full KL, by at most max(0, s log(p(TAIL) q(STOP) / (q(TAIL) p(STOP)))) with p as it is seen, since it is
convex in s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kat_ray.losses.eos import EosMode

# A tail made as 1 - sum(p) is, below fp32's resolution of 1, rounding noise, and its logarithm anything.
LOG_FLOOR = math.log(2.0**-24)
_ABSENT = -200.0  # stands for the logarithm of 0: exp of it is nothing beside any mass


def dequantise(topk: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Quantised log-probabilities in float32, rescaled so that the top k [N, k] and the rest sum to 1 again.

    `others` [N] are the log-masses of the rest, `tail` and, where it is known apart, `stop`, in full precision.
    Rounding moved the sum by some 1e-4; what KL would make of that does not vanish where both models agree, and
    can be negative. Of a distribution KL is >= 0, and its error shrinks with the KL itself.
    """
    topk, rest = topk.float(), [other.float() for other in others]
    total = torch.logsumexp(torch.cat([topk, *(other[:, None] for other in rest)], dim=-1), dim=-1)
    return topk - total[:, None], *(other - total for other in rest)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, stable at both ends; -inf at 0. Same shape as x."""
    near_zero = x > -math.log(2.0)
    # Each branch sees only arguments it is finite for: a NaN in the unused one would reach the gradient.
    small = torch.where(near_zero, x, torch.full_like(x, -0.5))
    large = torch.where(near_zero, torch.full_like(x, -1.0), x)
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def tail_from_topk(topk_logprobs: Tensor) -> Tensor:
    """Log of the mass outside the top k, [N], from log-probabilities [N, k]; at least LOG_FLOOR."""
    inside = torch.logsumexp(topk_logprobs.float(), dim=-1)
    room = math.log1p(-math.exp(LOG_FLOOR))  # where 1 - exp(inside) would fall below the floor
    tail = log1mexp(torch.clamp(inside, max=room))
    return torch.where(torch.isnan(inside), inside, tail)


def tail_and_stop(logprobs: Tensor, topk_ids: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-masses outside `topk_ids` [N, k], exactly, from all log-probabilities [N, V]: see the module; [N] each.

    -inf where there is no such id. Stop ids that the vocabulary does not have are left out.
    """
    ids = torch.tensor(
        [i for i in set(stop_ids) if i < logprobs.shape[-1]], device=logprobs.device, dtype=torch.long
    )
    outside = logprobs.scatter(-1, topk_ids, -math.inf)
    stop = log_sum(outside.index_select(-1, ids))
    return log_sum(outside.index_fill_(-1, ids, -math.inf)), stop


def tail_and_stop_of_ids(
    topk_logprobs: Tensor, topk_ids: Tensor, stop_logprobs: Tensor, stop_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The same where only the log-probabilities of the top k [N, k] and of the stop ids [N, S] are known.

    The tail is what they leave of 1, at least LOG_FLOOR.
    """
    ids = torch.tensor(list(stop_ids), device=topk_ids.device, dtype=topk_ids.dtype)
    among = (topk_ids[:, :, None] == ids).any(dim=1)
    stop = log_sum(stop_logprobs.masked_fill(among, -math.inf))
    return _log_subtract(tail_from_topk(topk_logprobs), stop), stop


def log_sum(values: Tensor) -> Tensor:
    """Logsumexp over the last dimension; -inf, with a gradient of 0, where nothing or only -inf is summed."""
    if not values.shape[-1]:
        return values.new_full(values.shape[:-1], -math.inf)
    if not values.requires_grad:
        return torch.logsumexp(values, dim=-1)
    none = torch.isneginf(values.amax(dim=-1))
    return torch.logsumexp(values.masked_fill(none[..., None], 0.0), dim=-1).masked_fill(none, -math.inf)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), with a gradient of 0 where both are -inf."""
    return log_sum(torch.stack([a, b], dim=-1))


def is_stop(topk_ids: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Which of the ids [N, k] are stop ids; bool [N, k]."""
    if not stop_ids:
        return torch.zeros_like(topk_ids, dtype=torch.bool)
    return torch.isin(topk_ids, torch.tensor(list(stop_ids), device=topk_ids.device, dtype=topk_ids.dtype))


def event_logprobs(
    topk_logprobs: Tensor, tail: Tensor, stop: Tensor | None, stop_in_topk: Tensor, eos: EosMode
) -> Tensor:
    """Log-probabilities of the events, [N, k + 2]: k singletons, STOP, TAIL; -inf where an event is absent.

    topk_logprobs [N, k] are at the student's top-k ids; outside them, `stop` [N] is the log-mass of stop ids and
    `tail` [N] that of all others (without `stop`: of all). `stop_in_topk` [N, k] from `is_stop`. The student's ids
    define the partition, so both models get the same.
    """
    absent = torch.full_like(tail, -math.inf)
    whole = tail if stop is None else log_add(tail, stop)
    if eos == "raw":
        return torch.cat([topk_logprobs, absent[:, None], whole[:, None]], dim=-1)
    present = stop_in_topk.any(dim=-1)
    singles = topk_logprobs.masked_fill(stop_in_topk, -math.inf)
    tail_event = torch.where(present, tail, whole)
    if eos == "mask":
        kept = torch.cat([singles, absent[:, None], tail_event[:, None]], dim=-1)
        return kept - torch.logsumexp(kept, dim=-1, keepdim=True)
    stop_event = torch.where(present, stop_logprob(topk_logprobs, stop, stop_in_topk), absent)
    return torch.cat([singles, stop_event[:, None], tail_event[:, None]], dim=-1)


def stop_logprob(topk_logprobs: Tensor, stop: Tensor | None, stop_in_topk: Tensor) -> Tensor:
    """Log of the mass of all stop ids [N]; see `event_logprobs`. -inf where there is none."""
    inside = topk_logprobs.masked_fill(~stop_in_topk, -math.inf)
    return log_sum(inside if stop is None else torch.cat([inside, stop[:, None]], dim=-1))


def _log_subtract(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)), at least LOG_FLOOR; also where b >= a."""
    room = math.log1p(-math.exp(LOG_FLOOR))  # where 1 - exp(b - a) would fall below the floor
    difference = torch.where(torch.isfinite(a), b - a, torch.zeros_like(a))
    result = a + log1mexp(difference.clamp(max=room))
    return torch.where(b >= a, torch.full_like(a, LOG_FLOOR), result).clamp_min(LOG_FLOOR)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) [N] in nats from event log-probabilities [N, E]; differentiable in both.

    An event that is absent (-inf) on the student's side adds nothing, to value and gradient. A row with a NaN,
    or where the teacher gives no mass to an event that the student has, is not finite: the caller drops it
    by mask and counts it.
    """
    present = ~torch.isneginf(student)
    p = torch.where(present, student, torch.zeros_like(student))
    q = torch.where(present, teacher, torch.zeros_like(teacher))
    return torch.where(present, torch.exp(p) * (p - q), torch.zeros_like(p)).sum(dim=-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) [N] in nats from event log-probabilities [N, E]; see `reverse_kl`.

    Not finite where the student gives no mass to an event that the teacher has.
    """
    return reverse_kl(teacher, student)


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence (arXiv 2306.13649), [N] in nats from log-probabilities [N, E].

    b KL(teacher || m) + (1 - b) KL(student || m) with m = b teacher + (1 - b) student and 0 < b = `beta` < 1;
    differentiable in both. For b = 1/2 it is at most log 2, also where an event is absent on one side. Divided by
    b, or by 1 - b, it tends to the forward KL as b goes to 0, and to the reverse KL as b goes to 1. A row with a
    NaN is NaN.
    """
    p, q, over_p, over_q = _mixture(student, teacher, beta)
    return -(beta * q.exp() * over_q + (1.0 - beta) * p.exp() * over_p).sum(dim=-1)


def skewed_forward_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The skew KL of DistiLLM (arXiv 2402.03898), [N] in nats from log-probabilities [N, E].

    KL(teacher || a teacher + (1 - a) student), 0 < a = `alpha` < 1; differentiable in both. It is at most -log a,
    also where the student gives no mass to an event that the teacher has, and tends to the forward KL as a goes to
    0. A row with a NaN is NaN.
    """
    _, q, _, over_q = _mixture(student, teacher, alpha)
    return -(q.exp() * over_q).sum(dim=-1)


def skewed_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The skew reverse KL of the same, KL(student || (1 - a) teacher + a student); see `skewed_forward_kl`."""
    return skewed_forward_kl(teacher, student, alpha)


def _mixture(student: Tensor, teacher: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log p, log q, log(m / p), log(m / q) of m = share q + (1 - share) p; the student is p, each [N, E].

    No value is infinite: an absent event has no mass at exp(-200), and its differences are finite.
    """
    p, q = student.clamp_min(_ABSENT), teacher.clamp_min(_ABSENT)
    gap = q - p
    # log(m / p) where q <= p, log(m / q) where q > p: exactly 0 where both are equal, and no exponential overflows.
    from_p = torch.log1p(share * torch.expm1(gap.clamp(max=0.0)))
    from_q = torch.log1p((1.0 - share) * torch.expm1(-gap.clamp(min=0.0)))
    return p, q, torch.where(gap <= 0, from_p, from_q + gap), torch.where(gap <= 0, from_p - gap, from_q)


def entropy(event_logprobs_NE: Tensor) -> Tensor:
    """Entropy [N] in nats of distributions given as log-probabilities [N, E]; absent events add nothing."""
    present = ~torch.isneginf(event_logprobs_NE)
    values = torch.where(present, event_logprobs_NE, torch.zeros_like(event_logprobs_NE))
    return -torch.where(present, torch.exp(values) * values, torch.zeros_like(values)).sum(dim=-1)


def full_reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The reference: KL over the whole vocabulary, [N] from logits [N, V], in float64."""
    p = torch.log_softmax(student_logits.double(), dim=-1)
    q = torch.log_softmax(teacher_logits.double(), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
