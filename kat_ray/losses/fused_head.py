"""The output layer and the loss in one, a chunk of tokens at a time: value and gradients of a `LossTerm`.

Logits [tokens, vocabulary] exist for a chunk of tokens only. A term depends on them through k + 3 numbers a token,
so its gradient in the logits is written over them in a few passes. Where the output layer is a plain, whole matrix,
its gradients are computed in the forward pass too and no product is computed twice; elsewhere the layer is called
as a module, and again in the backward pass (ZeRO 3 gathers a weight while its module is called).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kat_ray.losses.term import LossTerm, StudentLogprobs, TermSums, TokenRows


def head_loss(
    hidden_TH: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    rows: TokenRows,
    term: LossTerm,
    chunk_tokens: int,
    min_chunks: int = 0,
) -> TermSums:
    """The term over T tokens, whose loss can be differentiated.

    `hidden_TH` holds the student's last hidden states, [T, H], each of the position *before* its token. Logits
    exist for `chunk_tokens` tokens at a time. An `lm_head` called as a module is called for at least `min_chunks`
    chunks, empty ones if need be: under ZeRO 3 each call is a collective operation, and all ranks must make the
    same number of them.
    """
    weight = _plain_weight(lm_head)
    if weight is not None:
        return TermSums(*_FusedHead.apply(hidden_TH, weight, rows, term, chunk_tokens))
    total = _zero(hidden_TH, term)
    chunks = max(min_chunks, -(-hidden_TH.shape[0] // chunk_tokens))
    for start in range(0, chunks * chunk_tokens, chunk_tokens):
        part = checkpoint(
            lambda hidden_CH, rows: _LogitsLoss.apply(lm_head(hidden_CH), rows, term),
            hidden_TH[start : start + chunk_tokens],
            rows.part(start, start + chunk_tokens),
            use_reentrant=False,
        )
        total = _add(total, TermSums(*part))
    return total


def _plain_weight(lm_head: Any) -> Tensor | None:
    """The weight of a linear layer without bias, if this rank holds all of it: ZeRO 3 marks those in pieces."""
    is_plain = type(lm_head) is nn.Linear and lm_head.bias is None and not hasattr(lm_head.weight, "ds_id")
    return lm_head.weight if is_plain else None


def _zero(hidden_TH: Tensor, term: LossTerm) -> TermSums:
    loss = hidden_TH.new_zeros((), dtype=torch.float32)
    return TermSums(loss, torch.zeros(len(term.sum_names), dtype=torch.float64), torch.zeros(len(term.max_names)))


def _add(total: TermSums, part: TermSums) -> TermSums:
    maxima = torch.maximum(total.maxima, part.maxima.cpu())
    return TermSums(total.loss + part.loss, total.sums + part.sums.cpu(), maxima)


class _FusedHead(torch.autograd.Function):
    """Output layer and loss: both gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, rows: TokenRows, term: LossTerm, chunk_tokens: int
    ) -> TermSums:
        d_hidden, d_weight = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        total = _zero(hidden_TH, term)
        for start in range(0, len(hidden_TH), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = (hidden_TH[part] @ weight_VH.t()).float()
            total = _add(total, _loss_and_gradient(logits, rows.part(start, start + chunk_tokens), term))
            d_logits = logits.to(weight_VH.dtype)
            torch.mm(d_logits, weight_VH, out=d_hidden[part])
            d_weight.addmm_(d_logits.t(), hidden_TH[part])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(total.sums, total.maxima)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        # In place: they have no other use, and the weight's is as large as the weight.
        return d_hidden.mul_(grads[0]), d_weight.mul_(grads[0]), None, None, None


class _LogitsLoss(torch.autograd.Function):
    """The loss from logits [C, V]."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, rows: TokenRows, term: LossTerm) -> TermSums:
        gradient = logits_CV.to(torch.float32, copy=True)
        result = _loss_and_gradient(gradient, rows, term)
        ctx.dtype = logits_CV.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(result.sums, result.maxima)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]).to(ctx.dtype), None, None


@torch.no_grad()
def _loss_and_gradient(logits_CV: Tensor, rows: TokenRows, term: LossTerm) -> TermSums:
    """The term over a chunk; overwrites `logits_CV` float32 with the loss's gradient.

    With S the sum of exp over the vocabulary, R that over the ids outside the top k, and D the sum of the loss's
    derivatives in the logarithms of the top k, of the tail, of the stop mass and of the sampled token, the gradient
    in logit v is -D exp(v) / S, plus the derivative of v's own event: dlog p(v) in the top k, dtail exp(v) / R
    outside, plus dstop exp(v) / (sum over stop ids) at a stop id, plus dlog p(v) at the sampled token.
    """
    ids, token_C1 = rows.topk_ids, rows.token_ids[:, None]
    stop_index = torch.tensor(
        [i for i in term.stop_ids if i < logits_CV.shape[1]], device=ids.device, dtype=torch.long
    )
    logits_CV -= logits_CV.amax(dim=-1, keepdim=True)
    picked_Ck, stops_Cs = logits_CV.gather(-1, ids), logits_CV.index_select(1, stop_index)
    sampled_C = logits_CV.gather(-1, token_C1)[:, 0]
    weights_CV = logits_CV.exp_().scatter_(-1, ids, 0.0)
    outside_C = weights_CV.sum(dim=-1)
    total_C = outside_C + picked_Ck.exp().sum(dim=-1)
    lse_C = total_C.log()
    student = StudentLogprobs(
        topk=picked_Ck - lse_C[:, None],
        tail=outside_C.log() - lse_C,
        stop=torch.logsumexp(stops_Cs, dim=-1) - lse_C,
        sampled=sampled_C - lse_C,
    )
    result, d = _differentiate(term, student, rows)
    # A masked logit has no mass to move; autograd gives NaN where all stop ids of the top k are such.
    d_topk = d.topk.masked_fill(torch.isneginf(picked_Ck), 0.0)
    d_sampled = d.sampled.masked_fill(torch.isneginf(sampled_C), 0.0)
    share_C = -(d_topk.sum(dim=-1) + d.tail + d.stop + d_sampled) / total_C
    own_C = torch.where(outside_C > 0, d.tail / outside_C, torch.zeros_like(d.tail))
    weights_CV *= (own_C + share_C)[:, None]
    weights_CV.scatter_(-1, ids, d_topk + share_C[:, None] * picked_Ck.exp())
    weights_CV.scatter_add_(-1, token_C1, d_sampled[:, None])
    of_stops_Cs = torch.where(d.stop[:, None] != 0, d.stop[:, None] * stops_Cs.softmax(dim=-1), 0.0)
    weights_CV.index_add_(1, stop_index, of_stops_Cs)
    return result


def _differentiate(term: LossTerm, student: StudentLogprobs, rows: TokenRows) -> tuple[TermSums, StudentLogprobs]:
    """The term, detached, and the derivatives of its loss in each of the student's log-probabilities."""
    leaves = StudentLogprobs(*(leaf.requires_grad_() for leaf in student))
    # A checkpoint around this stores no tensors of this small graph: it would compute everything again right here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        result = term(leaves, rows)
        derivatives = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    return result._replace(loss=result.loss.detach()), StudentLogprobs(*derivatives)
