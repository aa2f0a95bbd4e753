"""The distillation loss: reverse KL with gradient through the student, the vocabulary in chunks of tokens.

The gradient flows through the (k + 1)-way KL itself. Putting the KL into a detached advantage, or
back-propagating the sampled token's log-ratio, has an expected gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kat_ray.divergence import (
    EosMode,
    entropy,
    event_logprobs,
    is_stop,
    reverse_kl,
    stop_mass,
    tail_from_logprobs,
)

# Names of the sums that `distillation_loss` returns beside the loss, one column each.
SUMS = ("tokens", "weight", "dropped", "logprob_diff", "entropy", "tail_mass", "stop_mass")


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's side for T tokens; the student's top-k ids define the events."""

    topk_ids: Tensor  # [T, k] int64
    topk_logprobs: Tensor  # [T, k] float32
    tail: Tensor  # [T] float32
    stop: Tensor  # [T] float32
    token_ids: Tensor  # [T] int64, the sampled tokens
    sampled_logprobs: Tensor  # [T] float32, at generation time
    weights: Tensor  # [T] float32, what each token's KL counts; 0 leaves it out

    def rows(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Rows start..end of every field."""
        return tuple(
            f[start:end]
            for f in (
                self.topk_ids,
                self.topk_logprobs,
                self.tail,
                self.stop,
                self.token_ids,
                self.sampled_logprobs,
                self.weights,
            )
        )


@dataclass(frozen=True)
class LossSums:
    """`loss` is the weighted sum of the KL over the tokens that count, with gradient; the rest is for metrics."""

    loss: Tensor  # scalar, nats
    sums: Tensor  # [len(SUMS)] float64, detached
    logprob_diff_max: Tensor  # scalar: largest |log p learner - log p sampler| of a sampled token


def distillation_loss(
    hidden_TH: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: TeacherTargets,
    stop_ids: Sequence[int],
    eos: EosMode,
    chunk_tokens: int,
    min_chunks: int = 0,
) -> LossSums:
    """Weighted sum over T tokens of KL(student || teacher) in nats.

    `hidden_TH` holds the student's last hidden states, [T, H], each of the position *before* its token. Logits
    and log-softmax exist for `chunk_tokens` tokens at a time, in the forward pass and, by recomputation, in
    the backward pass. A token whose KL is not finite leaves value and gradient by mask and is counted.
    `lm_head` is called for at least `min_chunks` chunks, empty ones if need be: under ZeRO 3 each call is a
    collective operation, and all ranks must make as many.
    """
    total = hidden_TH.new_zeros((), dtype=torch.float32)
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    worst = torch.zeros(())
    chunks = max(min_chunks, -(-hidden_TH.shape[0] // chunk_tokens))
    for start in range(0, chunks * chunk_tokens, chunk_tokens):
        rows = targets.rows(start, start + chunk_tokens)
        loss, chunk_sums, chunk_worst = checkpoint(
            _chunk_loss,
            hidden_TH[start : start + chunk_tokens],
            lm_head,
            rows,
            stop_ids,
            eos,
            use_reentrant=False,
        )
        total = total + loss
        sums += chunk_sums.cpu()
        worst = torch.maximum(worst, chunk_worst.cpu())
    return LossSums(total, sums, worst)


def _chunk_loss(
    hidden_CH: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    rows: tuple[Tensor, ...],
    stop_ids: Sequence[int],
    eos: EosMode,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, teacher_topk, teacher_tail, teacher_stop, token_ids, sampled, weights = rows
    logprobs = torch.log_softmax(lm_head(hidden_CH).float(), dim=-1)
    stops = is_stop(ids, stop_ids)
    tail = tail_from_logprobs(logprobs, ids)
    stop = stop_mass(logprobs, stop_ids)
    student = event_logprobs(logprobs.gather(-1, ids), tail, stop, stops, eos)
    teacher = event_logprobs(teacher_topk, teacher_tail, teacher_stop, stops, eos)
    # A teacher's NaN must not meet the student's graph: 0 * NaN is NaN in the backward pass.
    usable = torch.isfinite(reverse_kl(student.detach(), teacher))
    kl = reverse_kl(student, torch.where(usable[:, None], teacher, student.detach()))
    counts = weights > 0
    dropped, usable = ~usable & counts, usable & counts
    loss = torch.where(usable, weights * kl, torch.zeros_like(kl)).sum()
    with torch.no_grad():
        diff = (logprobs.gather(-1, token_ids[:, None])[:, 0] - sampled).abs()
        diff = torch.where(torch.isfinite(diff), diff, torch.zeros_like(diff))
        columns = (usable, weights, diff, entropy(student), tail.exp(), stop.exp())
        tokens, *means = (torch.where(usable, c, 0).double().sum() for c in columns)
        sums = torch.stack([tokens, means[0], dropped.double().sum(), *means[1:]])
    return loss, sums, torch.cat([diff, diff.new_zeros(1)]).max()
