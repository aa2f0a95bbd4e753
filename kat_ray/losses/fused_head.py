"""The output layer and the loss in one, a chunk of tokens at a time: value and gradients of a `LossTerm`.

Logits [tokens, vocabulary] exist for a chunk of tokens only, in float32. A term depends on them through k + 3
numbers a token, so its gradient in the logits is written over them in a few passes. The gradients of hidden
states and weight are computed in the forward pass too, no product twice; the weight's is summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.output_layer import OutputLayer, add_outer_, product_with_weight
from kat_ray.losses.term import (
    EventLogprobs,
    LossTerm,
    SeesGradient,
    StudentLogprobs,
    TermSums,
    TokenRows,
    temperature_of,
)

# Tokens of a call whose whole distribution is sorted: 0.17 s on a core for 49,152 entries each, beside seconds. Of
# 8 tokens a call, in steps of one call, the k for 99 % of the mass scattered by a factor of 3.
_CURVE_TOKENS = 32


def head_loss(
    hidden_TH: Tensor, layer: OutputLayer, rows: TokenRows, term: LossTerm, chunk_tokens: int
) -> TermSums:
    """The term over T tokens, whose loss can be differentiated.

    `hidden_TH` holds the student's last hidden states, [T, H], each of the position *before* its token. Logits
    exist for `chunk_tokens` tokens at a time. Where autograd is off, only the value is computed.
    """
    if not torch.is_grad_enabled():
        return _value(hidden_TH, layer, rows, term, chunk_tokens)
    return TermSums(*_FusedHead.apply(hidden_TH, layer.weight, layer.bias, layer, rows, term, chunk_tokens))


class HeadLoss(nn.Module):
    """`head_loss` as a module that owns the output layer's weight: ZeRO 3 gathers it while this is called.

    `curve` is given the whole distribution of some tokens of each call.
    """

    def __init__(
        self, layer: OutputLayer, term: LossTerm, chunk_tokens: int, curve: MassCurve | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.head.weight, layer.head.bias
        self._layer = [layer]  # in a list: its module belongs to the network, and is not to be gathered here
        self.term, self._chunk_tokens = term, chunk_tokens
        self.curve = curve

    def forward(self, hidden_TH: Tensor, rows: TokenRows) -> TermSums:
        if self.curve is not None:
            generated_TH = hidden_TH.detach()
            if rows.given_weights is not None:
                generated_TH = generated_TH[rows.given_weights == 0]
            tokens = len(generated_TH)
            some = torch.linspace(0, tokens - 1, min(_CURVE_TOKENS, tokens)).long()
            logits_CV = self._layer[0].logits(generated_TH[some.to(hidden_TH.device)])
            self.curve.add(logits_CV.div_(temperature_of(self.term)))
        return head_loss(hidden_TH, self._layer[0], rows, self.term, self._chunk_tokens)


def _zero(hidden_TH: Tensor, term: LossTerm) -> TermSums:
    loss = hidden_TH.new_zeros((), dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
    return TermSums(loss, torch.zeros(len(term.sum_names), dtype=torch.float64), torch.zeros(len(term.max_names)))


def _add(total: TermSums, part: TermSums) -> TermSums:
    maxima = torch.maximum(total.maxima, part.maxima.cpu())
    return TermSums(total.loss + part.loss, total.sums + part.sums.cpu(), maxima)


def _value(hidden_TH: Tensor, layer: OutputLayer, rows: TokenRows, term: LossTerm, chunk_tokens: int) -> TermSums:
    total = _zero(hidden_TH, term)
    for start in range(0, len(hidden_TH), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        values_CV = layer.products(hidden_TH[part])
        layer.finish_(values_CV)
        total = _add(total, loss_and_gradient(values_CV, rows.part(part), term, gradient=False))
    return total


class _FusedHead(torch.autograd.Function):
    """Output layer and loss: all gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        layer: OutputLayer,
        rows: TokenRows,
        term: LossTerm,
        chunk_tokens: int,
    ) -> TermSums:
        total = _zero(hidden_TH, term)
        d_hidden = torch.empty_like(hidden_TH, dtype=total.loss.dtype)
        # A weight that is not trained has none: beside adapters it would be the largest array of all.
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        d_weight = torch.zeros_like(weight_VH, dtype=total.loss.dtype) if of_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=total.loss.dtype) if bias_V is not None and of_bias else None
        for start in range(0, len(hidden_TH), chunk_tokens):
            hidden_CH = hidden_TH[start : start + chunk_tokens]
            part, d_CV = _products_gradient(hidden_CH, layer, rows.part(slice(start, start + chunk_tokens)), term)
            total = _add(total, part)
            if d_bias is not None:
                d_bias += d_CV.sum(dim=0)
            if layer.hidden_scale != 1.0:
                d_CV *= layer.hidden_scale
            d_hidden[start : start + chunk_tokens] = product_with_weight(d_CV, weight_VH)
            if d_weight is not None:
                add_outer_(d_weight, d_CV, hidden_CH)
        ctx.dtypes = hidden_TH.dtype, weight_VH.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(total.sums, total.maxima)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they have no other use, and the weight's is twice as large as a weight in bfloat16.
        of_hidden, of_weight = ctx.dtypes
        d_hidden, d_weight, d_bias = (
            None if d is None else d.mul_(grads[0]).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, (of_hidden, of_weight, of_weight), strict=True)
        )
        return d_hidden, d_weight, d_bias, None, None, None, None


def _products_gradient(
    hidden_CH: Tensor, layer: OutputLayer, rows: TokenRows, term: LossTerm
) -> tuple[TermSums, Tensor]:
    """The term over a chunk, and its gradient in the output layer's products [C, V]."""
    values_CV = layer.products(hidden_CH)
    layer.finish_(values_CV)
    slopes_CV = layer.slopes(values_CV)
    result = loss_and_gradient(values_CV, rows, term)
    if slopes_CV is not None:
        values_CV *= slopes_CV
    elif layer.scale != 1.0:
        values_CV *= layer.scale
    return result, values_CV


@torch.no_grad()
def loss_and_gradient(logits_CV: Tensor, rows: TokenRows, term: LossTerm, *, gradient: bool = True) -> TermSums:
    """The term over a chunk; overwrites `logits_CV`, with the loss's gradient unless that is not asked for.

    A term with a temperature takes a second array of this size for the logits divided by it.
    """
    ids, temperature = rows.topk_ids, temperature_of(term)
    stop_index = torch.tensor(
        sorted({i for i in term.stop_ids if i < logits_CV.shape[1]}), device=ids.device, dtype=torch.long
    )
    tempered = None if temperature == 1.0 else _partition_(logits_CV / temperature, rows, stop_index)
    plain = _partition_(logits_CV, rows, stop_index)
    student = plain.logprobs()
    if tempered is not None:
        student = student._replace(tempered=EventLogprobs(*tempered.logprobs()[:3]))
    if not gradient:
        return term(student, rows)
    result, d = _differentiate(term, student, rows)
    d = plain.masked(d)
    if tempered is not None and d.tempered is not None:
        nothing = torch.zeros_like(d.sampled)
        of_events = tempered.masked(StudentLogprobs(*d.tempered, nothing))
        d = d._replace(tempered=EventLogprobs(*of_events[:3]))
        tempered.gradient_(of_events, rows, stop_index)
    if isinstance(term, SeesGradient):
        result = term.with_gradient(result, student, d, rows)
    plain.gradient_(d, rows, stop_index)
    if tempered is not None:
        logits_CV += tempered.weights_CV.div_(temperature)
    return result


class _Partition(NamedTuple):
    """Logits of a chunk, less their largest, in three: of the top k, of the stop ids outside them, of the rest."""

    weights_CV: Tensor  # exp of those of the rest; 0 elsewhere
    picked_Ck: Tensor  # of the top k
    sampled_C: Tensor  # of the sampled token
    stops_Cs: Tensor  # exp of those of the stop ids; 0 where one is in the top k
    rest_C: Tensor  # sums of exp
    stop_C: Tensor
    total_C: Tensor  # of the vocabulary

    def logprobs(self) -> StudentLogprobs:
        lse_C = self.total_C.log()
        return StudentLogprobs(
            topk=self.picked_Ck - lse_C[:, None],
            tail=self.rest_C.log() - lse_C,
            stop=self.stop_C.log() - lse_C,
            sampled=self.sampled_C - lse_C,
        )

    def masked(self, d: StudentLogprobs) -> StudentLogprobs:
        """Derivatives, 0 where there is no mass to move; autograd may give NaN there, as for masked stop ids."""
        return d._replace(
            topk=d.topk.masked_fill(torch.isneginf(self.picked_Ck), 0.0),
            tail=d.tail.masked_fill(self.rest_C == 0, 0.0),
            stop=d.stop.masked_fill(self.stop_C == 0, 0.0),
            sampled=d.sampled.masked_fill(torch.isneginf(self.sampled_C), 0.0),
        )

    def gradient_(self, d: StudentLogprobs, rows: TokenRows, stop_index: Tensor) -> None:
        """Overwrite `weights_CV` with the loss's gradient in the logits.

        With S the sum of exp over the vocabulary, and D the sum of the loss's derivatives `d` in the logarithms of
        the top k, of the rest (tail), of the stop ids (stop) and of the sampled token, the gradient in logit v is
        -D exp(v) / S, plus dlog p(v) in the top k, plus dlog p(v) at the sampled token, plus, outside the top k,
        the derivative in the logarithm of its part times exp(v) / (sum of exp over that part).
        """
        weights_CV, rest_C, stop_C = self.weights_CV, self.rest_C, self.stop_C
        share_C = -(d.topk.sum(dim=-1) + d.tail + d.stop + d.sampled) / self.total_C
        weights_CV *= (torch.where(rest_C > 0, d.tail / rest_C, 0.0) + share_C)[:, None]
        weights_CV.index_copy_(
            1, stop_index, self.stops_Cs * (torch.where(stop_C > 0, d.stop / stop_C, 0.0) + share_C)[:, None]
        )
        weights_CV.scatter_(-1, rows.topk_ids, d.topk + share_C[:, None] * self.picked_Ck.exp())
        weights_CV.scatter_add_(-1, rows.token_ids[:, None], d.sampled[:, None])


def _partition_(logits_CV: Tensor, rows: TokenRows, stop_index: Tensor) -> _Partition:
    """The three parts of a chunk's logits, which are overwritten."""
    ids = rows.topk_ids
    logits_CV -= logits_CV.amax(dim=-1, keepdim=True)
    picked_Ck = logits_CV.gather(-1, ids)
    sampled_C = logits_CV.gather(-1, rows.token_ids[:, None])[:, 0]
    weights_CV = logits_CV.exp_().scatter_(-1, ids, 0.0)
    stops_Cs = weights_CV.index_select(1, stop_index)
    rest_C, stop_C = weights_CV.index_fill_(1, stop_index, 0.0).sum(dim=-1), stops_Cs.sum(dim=-1)
    total_C = rest_C + stop_C + picked_Ck.exp().sum(dim=-1)
    return _Partition(weights_CV, picked_Ck, sampled_C, stops_Cs, rest_C, stop_C, total_C)


def _differentiate(term: LossTerm, student: StudentLogprobs, rows: TokenRows) -> tuple[TermSums, StudentLogprobs]:
    """The term, detached, and the derivatives of its loss in each of the student's log-probabilities."""
    leaves = [leaf.requires_grad_() for leaf in (*student[:4], *(student.tempered or ()))]
    # A checkpoint around this stores no tensors of this small graph: it would compute everything again right here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        result = term(_of_list(leaves), rows)
        found = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    return result._replace(loss=result.loss.detach()), _of_list(found)


def _of_list(columns: Sequence[Tensor]) -> StudentLogprobs:
    topk, tail, stop, sampled, *tempered = columns
    return StudentLogprobs(topk, tail, stop, sampled, EventLogprobs(*tempered) if tempered else None)
