"""Columns and loss on a device against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actors.acceptance.rows import Row
from actors.teacher.backend import columns_of
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import event_logprobs, is_stop, reverse_kl, tail_and_stop
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.term import TokenRows

STOPS = (1, 5)
_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest relative error of a gradient's norm
_LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Size:
    """Of the arithmetic: tokens, hidden width, vocabulary, top k, tokens of a chunk."""

    tokens: int
    hidden: int
    vocabulary: int
    top_k: int
    chunk: int


SMALL = Size(tokens=48, hidden=32, vocabulary=1_000, top_k=16, chunk=20)
LARGE = Size(tokens=1_024, hidden=1_024, vocabulary=151_936, top_k=64, chunk=256)


def columns(device: torch.device, size: Size) -> list[Row]:
    """The teacher's columns on the device against those of the same numbers in float64 on the CPU."""
    logits, ids = _logits(size, device)
    logprobs = torch.log_softmax(logits, -1)
    found = columns_of(logprobs, ids, STOPS)
    expected = columns_of(torch.log_softmax(logits.double().cpu(), -1), ids.cpu(), STOPS)
    rows = []
    for name in ("topk", "tail", "stop", "teacher_max", "teacher_entropy"):
        gap = (getattr(found, name).double() - getattr(expected, name).double()).nan_to_num(nan=0.0).abs().max()
        rows.append(Row("columns", f"{name}: largest difference from float64", float(gap), 1e-3, "nats"))
    same = float((found.top != expected.top).double().mean())
    return [*rows, Row("columns", "most likely id: share that differs", same, 0.01)]


def loss(device: torch.device, size: Size) -> list[Row]:
    """The fused loss, forward and backward, against dense float64, for weights of both data types."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, given = _loss_inputs(size, device, dtype)
        hidden.requires_grad_()
        value = head_loss(hidden, OutputLayer(head), given, Distillation(STOPS, "merged"), size.chunk).loss
        value.backward()
        expected, d_hidden, d_weight = _dense(hidden, head, given)
        name = str(dtype).removeprefix("torch.")
        assert hidden.grad is not None and head.weight.grad is not None
        rows += [
            Row("loss", f"{name}: relative error of the value", _relative(value, expected), _LOSS[dtype]),
            Row(
                "loss",
                f"{name}: of the gradient in hidden states",
                _relative(hidden.grad, d_hidden),
                _GRADIENT[dtype],
            ),
            Row(
                "loss",
                f"{name}: of the gradient in the weight",
                _relative(head.weight.grad, d_weight),
                _GRADIENT[dtype],
            ),
        ]
    return rows


def _logits(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    student, noise = (
        4 * torch.randn(size.tokens, size.vocabulary, generator=random, device=device) for _ in range(2)
    )
    return student + 0.5 * noise, student.topk(size.top_k, dim=-1).indices


def _loss_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, nn.Linear, TokenRows]:
    """Hidden states, an output layer, and a teacher near the student: the gradient is small where KL is."""
    random = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    hidden = draw(size.tokens, size.hidden).to(dtype)
    head = nn.Linear(size.hidden, size.vocabulary, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(draw(size.vocabulary, size.hidden) * 3 / size.hidden**0.5)
        logits = (hidden.float() @ head.weight.float().t()) + 0.3 * draw(size.tokens, size.vocabulary)
        ids = logits.topk(size.top_k, dim=-1).indices
        teacher = torch.log_softmax(logits + 0.3 * draw(size.tokens, size.vocabulary), -1)
        tail, stop = tail_and_stop(teacher, ids, STOPS)
    ones = torch.ones(size.tokens, device=device)
    return hidden, head, TokenRows(ids, teacher.gather(-1, ids), tail, stop, ids[:, 0], -ones, ones)


def _dense(hidden: Tensor, head: nn.Linear, rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients by autograd over all logits in float64."""
    h, w = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    p = torch.log_softmax(h @ w.t(), -1)
    stops = is_stop(rows.topk_ids, STOPS)
    own = event_logprobs(p.gather(-1, rows.topk_ids), *tail_and_stop(p, rows.topk_ids, STOPS), stops, "merged")
    teacher = event_logprobs(
        rows.teacher_topk.double(), rows.teacher_tail.double(), rows.teacher_stop.double(), stops, "merged"
    )
    value = reverse_kl(own, teacher).sum()
    value.backward()
    assert h.grad is not None and w.grad is not None
    return value.detach(), h.grad, w.grad


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())
