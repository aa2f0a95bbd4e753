"""The output layer behind the loss and the scores: scales, bias and cap, in float32 whatever the weights are in."""

import math

import pytest
import torch

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import event_logprobs, is_stop, reverse_kl, tail_and_stop
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.output_layer import OutputLayer, add_outer_, product_with_weight, wide_product
from kat_ray.losses.term import TokenRows

V, H, K, T = 40, 8, 6, 9
TERM = Distillation((3, 7), "merged")
SHAPES = [
    {}, {"scale": 0.3}, {"hidden_scale": 0.4}, {"cap": 2.0}, {"cap": 2.0, "scale": 1.7, "hidden_scale": 0.6},
]  # fmt: skip


def problem(bias=True, dtype=torch.float64, spread=1.0, vocabulary=V, width=H, seed=0):
    """A head, hidden states, and rows of a teacher near to or far from the student, all from float64 numbers."""
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(width, vocabulary, bias=bias, dtype=torch.float64)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    head, hidden = head.to(dtype), torch.randn(T, width, generator=g, dtype=torch.float64).to(dtype)
    return head, hidden, torch.randn(T, vocabulary, generator=g, dtype=torch.float64) * spread


def definition(layer, hidden, weight, bias):
    """Logits in float64, by the formula."""
    raw = (hidden * layer.hidden_scale) @ weight.t() + (0 if bias is None else bias)
    scaled = raw * layer.scale
    return scaled if layer.cap is None else torch.tanh(scaled / layer.cap) * layer.cap


def rows_of(logits, q):
    ids = logits.detach().topk(K, dim=-1).indices
    q = torch.log_softmax(q, -1)
    zero = torch.zeros(T, dtype=q.dtype)
    return TokenRows(ids, q.gather(-1, ids), *tail_and_stop(q, ids, (3, 7)), ids[:, 0], zero, zero + 1)


def exact_loss(logits, rows):
    """The term through autograd over the whole vocabulary."""
    p = torch.log_softmax(logits, -1)
    stops = is_stop(rows.topk_ids, (3, 7))
    own = p.gather(-1, rows.topk_ids), *tail_and_stop(p, rows.topk_ids, (3, 7))
    theirs = rows.teacher_topk, rows.teacher_tail, rows.teacher_stop
    events = (event_logprobs(*side, stops, "merged") for side in (own, theirs))
    return (reverse_kl(*events) * rows.weights).sum()


def test_a_frozen_output_layer_has_no_gradient_and_changes_no_other():
    head, hidden, q = problem()
    layer, rows = OutputLayer(head), rows_of(head(hidden), q)
    hidden.requires_grad_()
    (whole,) = torch.autograd.grad(head_loss(hidden, layer, rows, TERM, 4).loss, [hidden])
    head.requires_grad_(False)
    loss = head_loss(hidden, layer, rows, TERM, 4).loss
    assert [t for t in loss.grad_fn.saved_tensors if t is not None and t.shape == head.weight.shape] == []
    (alone,) = torch.autograd.grad(loss, [hidden])
    assert torch.equal(alone, whole) and head.weight.grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_the_derivative_of_the_loss(shape, bias):
    # Against finite differences in float64: scale, cap and bias are in our own backward pass.
    head, hidden, q = problem(bias)
    layer = OutputLayer(head, **shape)
    rows = rows_of(definition(layer, hidden, head.weight, head.bias), q)
    inputs = [t for t in (hidden.requires_grad_(), head.weight, head.bias) if t is not None]
    gradients = torch.autograd.grad(head_loss(hidden, layer, rows, TERM, 4).loss, inputs)
    step = 1e-5
    for tensor, gradient in zip(inputs, gradients, strict=True):
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            direction = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
            values = []
            for signed in (step, -2 * step):
                tensor.data += signed * direction
                values.append(head_loss(hidden, layer, rows, TERM, 4).loss.item())
            tensor.data += step * direction
            slope = (values[0] - values[1]) / (2 * step)
            assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula_in_float32(shape, dtype):
    head, hidden, _ = problem(dtype=dtype)
    layer = OutputLayer(head, **shape)
    exact = definition(layer, hidden.double(), head.weight.double(), head.bias.double())
    found = layer.logits(hidden)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_in_blocks_of_the_weight_are_the_whole_ones(dtype, monkeypatch):
    monkeypatch.setattr("kat_ray.losses.output_layer._BLOCK", 3 * H)
    head, hidden, d = problem(dtype=dtype)
    d, weight = d.float(), head.weight.detach()
    tolerance = {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(wide_product(hidden, weight), hidden.float() @ weight.float().t(), **tolerance)
    torch.testing.assert_close(product_with_weight(d, weight), d @ weight.float(), **tolerance)
    total = torch.ones(V, H)
    add_outer_(total, d, hidden)
    torch.testing.assert_close(total, 1 + d.t() @ hidden.float(), **tolerance)


def gradient_errors(spread):
    """Mean KL, and the relative error of a bfloat16 head's gradients against float64, ours and autograd's."""
    head, hidden, noise = problem(bias=False, dtype=torch.bfloat16, vocabulary=400, width=64, seed=1)
    with torch.no_grad():
        head.weight *= 1.3  # logits up to about 40
    layer, hidden = OutputLayer(head), hidden.requires_grad_()
    wide_h = hidden.detach().double().requires_grad_()
    logits = wide_h @ head.weight.detach().double().t()
    rows = rows_of(logits, logits.detach() + spread * noise)
    loss = exact_loss(logits, rows)
    (expected,) = torch.autograd.grad(loss, wide_h)
    float32 = TokenRows(*(c.float() if c.is_floating_point() else c for c in rows if c is not None))
    (ours,) = torch.autograd.grad(head_loss(hidden, layer, float32, TERM, 4).loss, hidden)
    (rounded,) = torch.autograd.grad(exact_loss(head(hidden).float(), float32), hidden)
    errors = [float((g.double() - expected).norm() / expected.norm()) for g in (ours, rounded)]
    return loss.item() / T, *errors


@pytest.mark.parametrize("spread", [0.3, 0.03])
def test_a_small_kl_has_its_gradient_in_bfloat16_too(spread):
    kl, ours, rounded = gradient_errors(spread)
    assert kl < 0.05 and ours < 5e-3, (kl, ours)
    assert rounded > 5 * ours, "logits rounded to bfloat16 give another gradient; else this shows nothing"


def test_the_gradient_of_the_weight_is_summed_in_float32():
    # Chunks that each add little to a sum that is large: in bfloat16 it would stand still.
    head = torch.nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(head.weight)
    n, half = 400, torch.log(torch.tensor(0.5))
    rows = TokenRows(
        torch.zeros(n, 1, dtype=torch.long),
        *(torch.full(size, v) for size, v in (((n, 1), -3.0), ((n,), -0.05), ((n,), -math.inf))),
        torch.zeros(n, dtype=torch.long),
        half.expand(n),
        torch.ones(n),
    )
    hidden = torch.ones(n, 1, dtype=torch.bfloat16, requires_grad=True)
    head_loss(hidden, OutputLayer(head), rows, Distillation((), "raw"), 1).loss.backward()
    # d/dz of p (log p + 3) + (1 - p)(log (1 - p) + 0.05) at p = 1/2, which is p (1 - p) (3 - 0.05).
    assert head.weight.grad[0].item() == pytest.approx(0.25 * 2.95 * n, rel=4e-3)
