"""The distillation loss: reverse KL with gradient through the student, the vocabulary in chunks of tokens.

The gradient flows through the (k + 1)-way KL itself. Putting the KL into a detached advantage, or
back-propagating the sampled token's log-ratio, has an expected gradient of zero.

Logits [tokens, vocabulary] exist for a chunk of tokens only. The KL depends on them through k + 2 numbers a token,
so its gradient in the logits is written over them in a few passes. Where the output layer's weight is at hand, its
gradients are computed in the forward pass too and no product is computed twice; elsewhere the layer is called as a
module and again in the backward pass (ZeRO 3 gathers a weight while its module is called).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kat_ray.losses.divergence import (
    LOG_FLOOR,
    EosMode,
    entropy,
    event_logprobs,
    is_stop,
    reverse_kl,
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
    exist for `chunk_tokens` tokens at a time. A token whose KL is not finite leaves value and gradient by mask and
    is counted. An `lm_head` called as a module is called for at least `min_chunks` chunks, empty ones if need be:
    under ZeRO 3 each call is a collective operation, and all ranks must make as many.
    """
    weight = _weight_at_hand(lm_head)
    if weight is not None:
        return LossSums(*_FusedHead.apply(hidden_TH, weight, targets, stop_ids, eos, chunk_tokens))
    total = hidden_TH.new_zeros((), dtype=torch.float32)
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    worst = torch.zeros(())
    chunks = max(min_chunks, -(-hidden_TH.shape[0] // chunk_tokens))
    for start in range(0, chunks * chunk_tokens, chunk_tokens):
        rows = targets.rows(start, start + chunk_tokens)
        loss, chunk_sums, chunk_worst = checkpoint(
            lambda hidden_CH, rows: _LogitsLoss.apply(lm_head(hidden_CH), rows, stop_ids, eos),
            hidden_TH[start : start + chunk_tokens],
            rows,
            use_reentrant=False,
        )
        total = total + loss
        sums += chunk_sums.cpu()
        worst = torch.maximum(worst, chunk_worst.cpu())
    return LossSums(total, sums, worst)


def _weight_at_hand(lm_head: Any) -> Tensor | None:
    """The weight that `lm_head` is, if it is nothing else and the weight is whole: ZeRO 3 marks those in pieces."""
    is_plain = type(lm_head) is nn.Linear and lm_head.bias is None and not hasattr(lm_head.weight, "ds_id")
    return lm_head.weight if is_plain else None


class _FusedHead(torch.autograd.Function):
    """Output layer and loss in one: both gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets: TeacherTargets,
        stop_ids: Sequence[int],
        eos: EosMode,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_hidden, d_weight = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        worst = torch.zeros(())
        for start in range(0, len(hidden_TH), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = (hidden_TH[part] @ weight_VH.t()).float()
            rows = targets.rows(start, start + chunk_tokens)
            loss, chunk_sums, chunk_worst = _loss_and_gradient(logits, rows, stop_ids, eos)
            d_logits = logits.to(weight_VH.dtype)
            torch.mm(d_logits, weight_VH, out=d_hidden[part])
            d_weight.addmm_(d_logits.t(), hidden_TH[part])
            total += loss
            sums += chunk_sums.cpu()
            worst = torch.maximum(worst, chunk_worst.cpu())
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(sums, worst)
        return total, sums, worst

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        # In place: they have no other use, and the weight's is as large as the weight.
        return d_hidden.mul_(grads[0]), d_weight.mul_(grads[0]), None, None, None, None


class _LogitsLoss(torch.autograd.Function):
    """The loss from logits [C, V]."""

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, rows: tuple[Tensor, ...], stop_ids: Sequence[int], eos: EosMode
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = logits_CV.to(torch.float32, copy=True)
        loss, sums, worst = _loss_and_gradient(gradient, rows, stop_ids, eos)
        ctx.dtype = logits_CV.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, worst)
        return loss, sums, worst

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]).to(ctx.dtype), None, None, None


@torch.no_grad()
def _loss_and_gradient(
    logits_CV: Tensor, rows: tuple[Tensor, ...], stop_ids: Sequence[int], eos: EosMode
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums and largest difference of a chunk; overwrites `logits_CV` float32 with the loss's gradient.

    With S the sum of exp over the vocabulary, R that over the ids outside the top k, and D the sum of the loss's
    derivatives in the logarithms of the top k, of the tail and of the stop mass, the gradient in logit v is
    -D exp(v) / S, plus the derivative of v's own event: dlog p(v) in the top k, dtail exp(v) / R outside, and
    dstop exp(v) / (sum over stop ids) at a stop id.
    """
    ids, token_ids, sampled = rows[0], rows[4], rows[5]
    stop_index = torch.tensor([i for i in stop_ids if i < logits_CV.shape[1]], device=ids.device, dtype=torch.long)
    logits_CV -= logits_CV.amax(dim=-1, keepdim=True)
    picked_Ck, stops_Cs = logits_CV.gather(-1, ids), logits_CV.index_select(1, stop_index)
    diff = logits_CV.gather(-1, token_ids[:, None])[:, 0]
    weights_CV = logits_CV.exp_().scatter_(-1, ids, 0.0)
    outside_C = weights_CV.sum(dim=-1)
    total_C = outside_C + picked_Ck.exp().sum(dim=-1)
    lse_C = total_C.log()
    leaves = [picked_Ck - lse_C[:, None], outside_C.log() - lse_C, torch.logsumexp(stops_Cs, dim=-1) - lse_C]
    diff = (diff - lse_C - sampled).abs()
    # A checkpoint around this stores no tensors of this small graph: it would compute everything again right here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        topk, tail, stop = (leaf.requires_grad_() for leaf in leaves)
        loss, sums, worst = _events_loss(topk, tail, stop, diff, rows, stop_ids, eos)
        d_topk, d_tail, d_stop = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    # A masked logit has no mass to move; autograd gives NaN where all stop ids of the top k are such.
    d_topk = d_topk.masked_fill(torch.isneginf(picked_Ck), 0.0)
    share_C = -(d_topk.sum(dim=-1) + d_tail + d_stop) / total_C
    own_C = torch.where(outside_C > 0, d_tail / outside_C, torch.zeros_like(d_tail))
    weights_CV *= (own_C + share_C)[:, None]
    weights_CV.scatter_(-1, ids, d_topk + share_C[:, None] * picked_Ck.exp())
    of_stops_Cs = torch.where(d_stop[:, None] != 0, d_stop[:, None] * stops_Cs.softmax(dim=-1), 0.0)
    weights_CV.index_add_(1, stop_index, of_stops_Cs)
    return loss.detach(), sums, worst


def _events_loss(
    topk: Tensor,
    tail: Tensor,
    stop: Tensor,
    diff: Tensor,
    rows: tuple[Tensor, ...],
    stop_ids: Sequence[int],
    eos: EosMode,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums, largest difference from log-probabilities [C, k] and the log-masses of tail and stop ids [C]."""
    ids, teacher_topk, teacher_tail, teacher_stop, _, _, weights = rows
    tail, stop = tail.clamp_min(LOG_FLOOR), stop.clamp_min(LOG_FLOOR)
    stops = is_stop(ids, stop_ids)
    student = event_logprobs(topk, tail, stop, stops, eos)
    teacher = event_logprobs(teacher_topk, teacher_tail, teacher_stop, stops, eos)
    # A teacher's NaN must not meet the student's graph: 0 * NaN is NaN in the backward pass.
    usable = torch.isfinite(reverse_kl(student.detach(), teacher))
    kl = reverse_kl(student, torch.where(usable[:, None], teacher, student.detach()))
    counts = ~(weights <= 0)  # a weight that is NaN counts: the loss shows it, and the step is skipped
    dropped, usable = ~usable & counts, usable & counts
    loss = torch.where(usable, weights * kl, torch.zeros_like(kl)).sum()
    with torch.no_grad():
        diff = torch.where(torch.isfinite(diff), diff, torch.zeros_like(diff))
        columns = (usable, weights, diff, entropy(student), tail.exp(), stop.exp())
        tokens, *means = (torch.where(usable, c, 0).double().sum() for c in columns)
        sums = torch.stack([tokens, means[0], dropped.double().sum(), *means[1:]])
    return loss, sums, torch.cat([diff, diff.new_zeros(1)]).max()
