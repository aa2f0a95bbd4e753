"""Head and distillation term: gradient, chunks, masks; and that descent moves the student to the teacher."""

import math

import pytest
import torch

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import (
    event_logprobs,
    full_reverse_kl,
    is_stop,
    reverse_kl,
    tail_and_stop,
)
from kat_ray.losses.fused_head import head_loss, loss_and_gradient
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.term import TermSums, TokenRows

V, H, K, T = 50, 8, 6, 11
RAW = Distillation((), "raw")


def problem(seed=0, teacher_nan=()):
    """A linear student over T hidden states, and a teacher's targets at the student's top k."""
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(H, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=g))
    hidden = torch.randn(T, H, generator=g)
    teacher_logits = torch.randn(T, V, generator=g) * 2
    q = torch.log_softmax(teacher_logits, -1)
    ids = head(hidden).topk(K, dim=-1).indices
    topk = q.gather(-1, ids)
    for row in teacher_nan:
        topk[row, 0] = torch.nan
    tokens = torch.randint(0, V, (T,), generator=g)
    sampled = torch.log_softmax(head(hidden), -1).gather(-1, tokens[:, None])[:, 0].detach()
    return (
        head,
        hidden,
        TokenRows(ids, topk, *tail_and_stop(q, ids, (3, 4)), tokens, sampled, torch.ones(T)),
        teacher_logits,
    )


def run(head, hidden, rows, chunk=1000, eos="raw", stop_ids=()):
    """Result and gradients."""
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    result = head_loss(hidden, OutputLayer(head), rows, Distillation(tuple(stop_ids), eos), chunk)
    result.loss.backward()
    return result, hidden.grad.clone(), head.weight.grad.clone()


def sums(result):
    return dict(zip(Distillation.sum_names, result.sums.tolist(), strict=True))


def test_value_and_gradient_equal_a_float64_autograd_of_the_definition():
    head, hidden, t, _ = problem()
    result, dh, dw = run(head, hidden, t)
    h = hidden.double().clone().requires_grad_()
    w = head.weight.detach().double().clone().requires_grad_()
    p = torch.softmax(h @ w.T, -1)
    top = p.gather(-1, t.topk_ids)
    rest = 1 - top.sum(-1)
    q = t.teacher_topk.double()
    whole = torch.logaddexp(t.teacher_tail, t.teacher_stop).double()
    kl = (top * (top.log() - q)).sum(-1) + rest * (rest.log() - whole)
    kl.sum().backward()
    assert result.loss.item() == pytest.approx(kl.sum().item(), rel=1e-5)
    torch.testing.assert_close(dh.double(), h.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(dw.double(), w.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 4, T, 100])
@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
def test_chunked_equals_whole(chunk, eos):
    head, hidden, t, _ = problem()
    whole, dh, dw = run(head, hidden, t, eos=eos, stop_ids=(3, 4))
    part, ph, pw = run(head, hidden, t, chunk=chunk, eos=eos, stop_ids=(3, 4))
    assert part.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    torch.testing.assert_close(ph, dh, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pw, dw, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part.sums, whole.sums, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("stop_ids", [(), (3, 4, V + 7)])
def test_gradient_in_the_logits_equals_autograd_through_all_log_probabilities(eos, k, stop_ids):
    # Values, not only sums of gradients: stop ids inside and outside the top k, an empty tail, a masked logit.
    head, hidden, t, teacher_logits = problem(seed=5)
    q = torch.log_softmax(teacher_logits, -1)
    logits = head(hidden).detach() * 2
    logits[4, 9] = -math.inf
    logits[6, [3, 4]] = -math.inf
    ids = logits.topk(k, dim=-1).indices
    tail, stop = tail_and_stop(q, ids, stop_ids)
    t = t._replace(topk_ids=ids, teacher_topk=q.gather(-1, ids), teacher_tail=tail, teacher_stop=stop)
    ours, theirs = logits.clone(), logits.clone().requires_grad_()
    result = loss_and_gradient(ours, t, Distillation(stop_ids, eos))
    p = torch.log_softmax(theirs, -1)
    stops = is_stop(ids, stop_ids)
    student = event_logprobs(p.gather(-1, ids), *tail_and_stop(p, ids, stop_ids), stops, eos)
    teacher = event_logprobs(t.teacher_topk, t.teacher_tail, t.teacher_stop, stops, eos)
    kl = reverse_kl(student, teacher)
    kl.sum().backward()
    assert result.loss.item() == pytest.approx(kl.sum().item(), rel=1e-5)
    # Autograd through all log-probabilities has NaN where all stop ids, or a token of the top k, are masked.
    keep = torch.isfinite(theirs.grad).all(dim=1)
    assert torch.isfinite(ours).all() and keep.sum() >= T - 2
    torch.testing.assert_close(ours[keep], theirs.grad[keep], atol=2e-6, rtol=1e-4)


class FourWeights:
    """A term that depends on all four log-probabilities of a token, by weights of their own."""

    stop_ids, sum_names, max_names = (3, 4), ("rows",), ()

    def __call__(self, student, rows):
        stop = torch.where(torch.isfinite(student.stop), student.stop, 0.0)
        loss = student.topk.sum() + 2 * student.tail.sum() + 3 * stop.sum() - 5 * student.sampled.sum()
        count = torch.tensor([float(len(student.sampled))], dtype=torch.float64)
        return TermSums(loss, count, torch.zeros(0))


def test_any_term_has_the_gradient_of_autograd_through_all_log_probabilities():
    head, hidden, t, _ = problem(seed=7)
    tokens = t.topk_ids[:, 2].clone()  # in the top k, outside it, and a stop id
    tokens[::2] = head(hidden)[::2].argmin(dim=-1)
    tokens[1] = 3
    h, o = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    result = head_loss(h, OutputLayer(head), t._replace(token_ids=tokens), FourWeights(), 4)
    result.loss.backward()
    found, head.weight.grad = head.weight.grad, None
    p = torch.log_softmax(head(o), -1)
    tails, stops = tail_and_stop(p, t.topk_ids, (3, 4))
    loss = p.gather(-1, t.topk_ids).sum() + (2 * tails - 5 * p.gather(-1, tokens[:, None])[:, 0]).sum()
    loss = loss + 3 * stops[torch.isfinite(stops)].sum()
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5) and result.sums.tolist() == [T]
    torch.testing.assert_close(h.grad, o.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, head.weight.grad, atol=1e-4, rtol=1e-4)


def test_a_masked_nan_adds_nothing_to_value_and_gradient():
    head, hidden, t, _ = problem(teacher_nan=(2, 7))
    result, dh, dw = run(head, hidden, t)
    keep = [i for i in range(T) if i not in (2, 7)]
    fewer = t.part(keep)
    expected, eh, ew = run(head, hidden[keep], fewer)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(dw, ew)
    torch.testing.assert_close(dh[keep], eh)
    assert dh[[2, 7]].abs().max() == 0
    assert (sums(result)["tokens"], sums(result)["dropped"]) == (T - 2, 2)


def test_a_weight_of_zero_leaves_a_token_out():
    head, hidden, t, _ = problem()
    keep = [i for i in range(T) if i not in (2, 7)]
    weights = torch.ones(T).index_fill(0, torch.tensor([2, 7]), 0.0)
    fewer = t.part(keep)
    result, dh, dw = run(head, hidden, t._replace(weights=weights))
    expected, eh, ew = run(head, hidden[keep], fewer)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(dw, ew)
    torch.testing.assert_close(dh[keep], eh)
    assert sums(result) == pytest.approx(sums(expected)) and sums(result)["weight"] == T - 2


def test_weights_scale_value_and_gradient_and_nothing_else():
    head, hidden, t, _ = problem()
    whole, dh, _ = run(head, hidden, t)
    half, hh, _ = run(head, hidden, t._replace(weights=torch.full((T,), 0.5)), chunk=4)
    assert half.loss.item() == pytest.approx(whole.loss.item() / 2, rel=1e-5)
    torch.testing.assert_close(hh, dh / 2)
    figures, other = sums(whole), sums(half)
    assert (other.pop("weight"), figures.pop("weight")) == (T / 2, T)
    assert other == pytest.approx(figures, rel=1e-5, abs=1e-5)


def test_a_student_that_diverged_is_dropped_not_repaired():
    head, hidden, t, _ = problem()
    hidden[3] = torch.nan
    result, _, _ = run(head, hidden, t)
    assert sums(result)["dropped"] == 1 and math.isfinite(result.loss.item())


def test_logprob_difference_is_zero_for_the_same_weights_and_counts_otherwise():
    head, hidden, t, _ = problem()
    result, *_ = run(head, hidden, t)
    assert sums(result)["logprob_diff"] < 1e-4 and result.maxima.item() < 1e-5
    shifted = t._replace(sampled_logprobs=t.sampled_logprobs - 0.5)
    assert sums(run(head, hidden, shifted)[0])["logprob_diff"] == pytest.approx(0.5 * T, rel=1e-4)


def test_no_tokens():
    head, hidden, t, _ = problem()
    none = t.part(slice(0, 0))
    assert head_loss(hidden[:0], OutputLayer(head), none, RAW, 4).loss.item() == 0.0


def test_descent_brings_the_student_to_the_teacher_over_the_whole_vocabulary():
    # Were the tail bucket left out, mass could leave the top k at no cost and the full KL would grow.
    head, hidden, t, teacher_logits = problem(seed=3)
    logits = head(hidden).detach().clone()
    logits.grad = torch.zeros_like(logits)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    before = full_reverse_kl(logits.detach(), teacher_logits).mean()
    q = torch.log_softmax(teacher_logits, -1)
    for _ in range(150):
        ids = logits.detach().topk(K, dim=-1).indices
        tail, stop = tail_and_stop(q, ids, (3, 4))
        now = t._replace(topk_ids=ids, teacher_topk=q.gather(-1, ids), teacher_tail=tail, teacher_stop=stop)
        logits.grad.copy_(logits)
        loss_and_gradient(logits.grad, now, RAW)
        optimiser.step()
    assert full_reverse_kl(logits.detach(), teacher_logits).mean() < 0.25 * before
