"""Reverse KL on the (k + 1)-way partition that the student's top k and one tail bucket make.

KL(p || q) = sum_e p(e) (log p(e) - log q(e)) in nats, over events e: the student's k most likely tokens, each
on its own, and everything else as one. A partition coarsens the vocabulary, hence 0 <= this <= full-vocabulary
KL, with equality where p and q agree in proportion within the tail (arXiv 2606.09471, section on top-k KL).

Stop ids (`eos`): `raw` leaves them singletons. `merged` turns the stop ids of both models, where one of them is
among the student's top k, into one STOP event on both sides; elsewhere they stay in the tail on both sides.
`mask` is `merged` with the STOP event left out and the rest renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

EosMode = Literal["raw", "merged", "mask"]

# A tail is 1 - sum(p): below fp32's resolution of 1 it is rounding noise, and its logarithm anything. Both sides
# have at least this much mass in their tail and stop events; it adds less than 1e-6 nats.
LOG_FLOOR = math.log(2.0**-24)


def dequantise(topk: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Quantised log-probabilities in float32, rescaled so that the top k [N, k] and the tail sum to 1 again.

    `others` [N] are the tail and any further log-masses of the same distribution, held in full precision. Rounding
    moved the sum by some 1e-4; what KL would make of that does not vanish where both models agree, and can be
    negative. Of a distribution KL is >= 0, and its error shrinks with the KL itself.
    """
    topk, tail = topk.float(), others[0].float()
    total = torch.logsumexp(torch.cat([topk, tail[:, None]], dim=-1), dim=-1)
    return topk - total[:, None], *(other.float() - total for other in others)


def quantise(topk: Tensor, stop: Tensor, stop_in_topk: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, k] in float16, and the log-mass of all stop ids [N] consistent with them.

    Stop ids outside the top k hold `stop` less what of it lies in the top k: a small difference, which must not
    take up the rounding of the latter.
    """
    small = topk.to(torch.float16)
    outside = _log_subtract(stop, _masked_logsumexp(topk, stop_in_topk))
    fitted = torch.logaddexp(_masked_logsumexp(small.float(), stop_in_topk), outside)
    return small, torch.where(stop_in_topk.any(dim=-1), fitted, stop)


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


def tail_from_logprobs(logprobs: Tensor, topk_ids: Tensor) -> Tensor:
    """Log of the mass outside `topk_ids` [N, k], exactly, from all log-probabilities [N, V]; shape [N]."""
    outside = logprobs.scatter(-1, topk_ids, -math.inf)
    if topk_ids.shape[-1] >= logprobs.shape[-1]:
        return logprobs.new_full(logprobs.shape[:-1], LOG_FLOOR)
    return torch.logsumexp(outside, dim=-1).clamp_min(LOG_FLOOR)


def stop_mass(logprobs: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Log of the mass of all stop ids that the vocabulary [N, V] holds, [N]; at least LOG_FLOOR."""
    ids = [i for i in stop_ids if i < logprobs.shape[-1]]
    if not ids:
        return logprobs.new_full(logprobs.shape[:-1], LOG_FLOOR)
    return torch.logsumexp(logprobs[..., ids], dim=-1).clamp_min(LOG_FLOOR)


def is_stop(topk_ids: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Which of the ids [N, k] are stop ids; bool [N, k]."""
    if not stop_ids:
        return torch.zeros_like(topk_ids, dtype=torch.bool)
    return torch.isin(topk_ids, torch.tensor(list(stop_ids), device=topk_ids.device, dtype=topk_ids.dtype))


def event_logprobs(
    topk_logprobs: Tensor, tail: Tensor, stop: Tensor | None, stop_in_topk: Tensor, eos: EosMode
) -> Tensor:
    """Log-probabilities of the events, [N, k + 2]: k singletons, STOP, TAIL; -inf where an event is absent.

    topk_logprobs [N, k] are at the student's top-k ids, `tail` [N] is the log-mass of all other ids,
    `stop` [N] the log-mass of all stop ids (None: only the top k is known, so STOP is what of it lies there),
    `stop_in_topk` [N, k] from `is_stop`. The student's ids define the partition, so both models get the same.
    """
    absent = torch.full_like(tail, -math.inf)
    if eos == "raw":
        return torch.cat([topk_logprobs, absent[:, None], tail[:, None]], dim=-1)
    present = stop_in_topk.any(dim=-1)
    inside = _masked_logsumexp(topk_logprobs, stop_in_topk)
    total = inside if stop is None else torch.maximum(stop, inside)
    # Stop ids outside the top k move from the tail to STOP: exp(tail) - (exp(total) - exp(inside)).
    moved = _log_subtract(total, inside)
    rest = _log_subtract(tail, moved).clamp_min(LOG_FLOOR)
    singles = topk_logprobs.masked_fill(stop_in_topk, -math.inf)
    tail_event = torch.where(present, rest, tail)
    if eos == "mask":
        kept = torch.cat([singles, absent[:, None], tail_event[:, None]], dim=-1)
        return kept - torch.logsumexp(kept, dim=-1, keepdim=True)
    stop_event = torch.where(present, total, absent)
    return torch.cat([singles, stop_event[:, None], tail_event[:, None]], dim=-1)


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """Logsumexp over the masked entries of [N, k]; LOG_FLOOR where there is none."""
    some = mask.any(dim=-1)
    masked = values.masked_fill(~mask, -math.inf)
    safe = torch.where(some[:, None], masked, torch.zeros_like(masked))
    return torch.where(some, torch.logsumexp(safe, dim=-1), torch.full_like(safe[:, 0], LOG_FLOOR))


def _log_subtract(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)), at least LOG_FLOOR; also where b >= a."""
    room = math.log1p(-math.exp(LOG_FLOOR))
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
