"""Reverse KL on the (k + 1)-way partition: hand-made numbers, the float64 reference, and laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.data.chunks import tail_logprobs
from kat_ray.losses.divergence import (
    LOG_FLOOR,
    dequantise,
    entropy,
    event_logprobs,
    full_reverse_kl,
    is_stop,
    log1mexp,
    log_add,
    reverse_kl,
    tail_and_stop,
    tail_and_stop_of_ids,
    tail_from_topk,
)


def events(p_logits, q_logits, k, stop_ids=(), eos="raw"):
    """Event log-probabilities of both models, as learner and scorer compute them."""
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    ids = p.topk(k, dim=-1).indices
    stops = is_stop(ids, stop_ids)
    return tuple(event_logprobs(x.gather(-1, ids), *tail_and_stop(x, ids, stop_ids), stops, eos) for x in (p, q))


def logits(seed, rows=6, vocabulary=20, scale=2.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def test_hand_made_numbers():
    # p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/4, 1/4, 1/4), k = 2: events 1/2, 1/4 and the tail 1/4.
    # KL = 1/2 log 2 + 1/4 log 1 + 1/4 log(1/4 : 1/2) = 1/2 log 2 - 1/4 log 2 = 1/4 log 2.
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    q = torch.full((1, 4), 0.25).log()
    assert reverse_kl(*events(p, q, 2)).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    # k = 3: the singleton 1/8 on its own: 1/2 log 2 + 0 + 1/8 log 1/2 + 1/8 log 1/2, the same by symmetry.
    assert reverse_kl(*events(p, q, 3)).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)


def test_merged_stop_ids_by_hand():
    # ids 0 and 3 are the two models' stop ids. Student: .4 .3 .2 .1, teacher: .1 .3 .2 .4: they stop alike.
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    q = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    assert reverse_kl(*events(p, q, 2, (0, 3), "raw")).item() > 0.1
    assert reverse_kl(*events(p, q, 2, (0, 3), "merged")).item() == pytest.approx(0.0, abs=1e-6)
    # With 0 alone: STOP .4 | .1, singleton .3 | .3, tail .3 | .6.
    expected = 0.4 * math.log(4) + 0.3 * math.log(0.5)
    assert reverse_kl(*events(p, q, 2, (0,), "merged")).item() == pytest.approx(expected, abs=1e-6)
    # mask: without STOP the student has .3 : .3, the teacher .3 : .6, each renormalised.
    expected = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    assert reverse_kl(*events(p, q, 2, (0,), "mask")).item() == pytest.approx(expected, abs=1e-6)


def test_a_stop_id_outside_the_top_k_stays_in_the_tail():
    p, q = logits(1), logits(2)
    least = p.argmin(dim=-1)[0].item()
    one_row = (p[:1], q[:1])
    raw, merged = (reverse_kl(*events(*one_row, 5, (least,), eos)) for eos in ("raw", "merged"))
    assert merged.item() == pytest.approx(raw.item(), abs=1e-6)


seeds, ks = st.integers(0, 10_000), st.integers(1, 19)


@given(seeds, seeds, ks, ks, st.sampled_from(["raw", "merged", "mask"]), st.floats(0.1, 8))
@settings(max_examples=200, deadline=None)
def test_laws(a, b, k1, k2, eos, scale):
    p, q = logits(a, scale=scale), logits(b, scale=scale)
    small, large = sorted((k1, k2))
    coarse, fine = (reverse_kl(*events(p, q, k, (3, 7), eos)) for k in (small, large))
    full = full_reverse_kl(p, q)
    assert (coarse >= -1e-6).all() and torch.isfinite(coarse).all()
    if eos == "raw":
        assert (coarse <= fine + 1e-5).all() and (fine <= full + 1e-4).all()
    if eos == "merged":
        assert (fine <= full + 1e-4).all()
    assert reverse_kl(*events(p, p, k1, (3, 7), eos)).abs().max() < 1e-6


@given(seeds, seeds)
@settings(max_examples=50, deadline=None)
def test_all_but_one_token_on_their_own_is_the_full_kl(a, b):
    p, q = logits(a), logits(b)
    torch.testing.assert_close(reverse_kl(*events(p, q, 19)).double(), full_reverse_kl(p, q), atol=1e-5, rtol=1e-4)


@given(seeds, ks, st.sampled_from(["merged", "mask"]))
@settings(max_examples=100, deadline=None)
def test_events_are_distributions(seed, k, eos):
    for side in events(logits(seed), logits(seed + 1), k, (3, 7), eos):
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(6), atol=1e-5, rtol=0)


def test_log1mexp_is_stable_at_both_ends():
    x = torch.tensor([-1e-6, -0.5, -1.0, -20.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), torch.log(-torch.expm1(x)), atol=0, rtol=1e-7)
    x = torch.tensor([0.0, -1e-30, -90.0], requires_grad=True)
    log1mexp(x)[1:].sum().backward()
    assert torch.isfinite(x.grad[1:]).all()


@given(seeds, st.floats(0.1, 30))
@settings(max_examples=100, deadline=None)
def test_three_ways_to_the_tail_agree(seed, scale):
    p = torch.log_softmax(logits(seed, scale=scale).double(), -1)
    best, ids = p.topk(8, dim=-1)
    exact, stop = tail_and_stop(p, ids, (3, 7))
    parts = torch.stack([best.exp().sum(-1), exact.exp(), stop.exp()])
    torch.testing.assert_close(parts.sum(0), torch.ones(6, dtype=torch.float64))
    exact = log_add(exact, stop)
    known = tail_and_stop_of_ids(best, ids, p[:, [3, 7]], (3, 7))
    torch.testing.assert_close(known[1], stop)
    torch.testing.assert_close(log_add(*known).exp(), exact.exp(), atol=5e-7, rtol=0)
    assert (known[0] >= LOG_FLOOR).all()
    np.testing.assert_allclose(tail_from_topk(best).exp(), exact.exp(), atol=2e-6)
    np.testing.assert_allclose(np.exp(tail_logprobs(best.float().numpy())), exact.exp(), atol=2e-6)


def test_a_nan_stays_in_its_row_and_an_absent_event_adds_nothing():
    p, q = events(logits(1), logits(2), 5, (3,), "merged")
    q = q.clone()
    q[2, 0] = torch.nan
    kl = reverse_kl(p, q)
    assert torch.isnan(kl).tolist() == [False, False, True, False, False, False]
    p = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    value = reverse_kl(p, torch.tensor([[-1.0, -math.inf]]))
    value.sum().backward()
    assert value.item() == 1.0 and torch.isfinite(p.grad).all()


def test_no_rows():
    p = torch.zeros(0, 20)
    assert reverse_kl(*events(p, p, 5, (3,), "merged")).shape == (0,)


def test_outside_the_top_k_there_may_be_nothing_or_stop_ids_only():
    p = torch.log_softmax(logits(1), -1)
    everything = p.topk(20, dim=-1).indices
    assert all(torch.isneginf(x).all() for x in tail_and_stop(p, everything, (3, 7)))
    ids = torch.tensor([[i for i in range(20) if i != 7]] * 6)
    tail, stop = tail_and_stop(p, ids, (3, 7, 99))
    assert torch.isneginf(tail).all() and torch.equal(stop, p[:, 7])
    for eos in ("raw", "merged", "mask"):
        logs = p.clone().requires_grad_()
        parts = logs.gather(-1, ids), *tail_and_stop(logs, ids, (3, 7))
        q = event_logprobs(*(x.detach() + 0.1 for x in parts), is_stop(ids, (3, 7)), eos)
        reverse_kl(event_logprobs(*parts, is_stop(ids, (3, 7)), eos), q).sum().backward()
        assert torch.isfinite(logs.grad).all()


def stopping(log_q_stop, p_stop=0.9, vocabulary=12):
    """Logits [1, V] of a student that stops with `p_stop` by id 3, and of a teacher that gives the stops little.

    Stop ids 3 and 7 have a share of `log_q_stop` each; the teacher gives all else nearly everything.
    """
    p = torch.full((1, vocabulary), math.log((1 - p_stop) / (vocabulary - 1)), dtype=torch.float64)
    p[0, 3] = math.log(p_stop)
    q = torch.linspace(0, 1, vocabulary, dtype=torch.float64)[None].clone()
    q[0, [3, 7]] = -torch.inf
    q = torch.log_softmax(q, -1) + math.log1p(-math.exp(log_q_stop))
    q[0, [3, 7]] = log_q_stop - math.log(2)
    return p, q


def exact_kl(p_logits, q_logits, k, stop_ids, eos):
    """KL of the events in float64 as sums of probabilities, with the vocabulary's ids in lists."""
    p, q = torch.softmax(p_logits, -1)[0], torch.softmax(q_logits, -1)[0]
    top = p.topk(k).indices.tolist()
    stops = [i for i in stop_ids if i < len(p)] if eos != "raw" and set(stop_ids) & set(top) else []
    parts = [[i] for i in top if i not in stops] + [[i for i in range(len(p)) if i not in {*top, *stops}]]
    if eos == "merged" and stops:
        parts.append(stops)
    a, b = (torch.stack([x[part].sum() for part in parts if part]) for x in (p, q))
    a, b = (x / x.sum() for x in (a, b))
    return (a * (a.log() - b.log())).sum()


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
@pytest.mark.parametrize("stop_ids", [(3,), (3, 7)])
@pytest.mark.parametrize("k", [4, 11, 12])
@pytest.mark.parametrize("log_q", [-10, -16, -20, -30, -40])
def test_value_and_gradient_are_exact_however_little_the_teacher_gives_a_stop(eos, stop_ids, k, log_q):
    p, q = stopping(log_q)
    # The student's other ids differ a little, so that the top k are no matter of ties.
    p = (p + 1e-3 * torch.arange(12)).requires_grad_()
    expected = exact_kl(p, q, k, stop_ids, eos)
    (slope,) = torch.autograd.grad(expected, p)
    own, theirs = p.detach().float().requires_grad_(), q.float()
    value = reverse_kl(*events(own, theirs, k, stop_ids, eos))
    (found,) = torch.autograd.grad(value, own)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.double(), slope, atol=2e-5, rtol=1e-4)


def test_the_divergence_of_a_stop_that_the_teacher_rules_out_by_hand():
    # p(stop) = 0.9. KL = 0.9 (log 0.9 - log q) + the rest, whose share is nearly the teacher's whole mass.
    for log_q in (-20.0, -30.0):
        p = torch.tensor([[0.9, 0.1]]).log()
        q = torch.tensor([[log_q, math.log1p(-math.exp(log_q))]])
        expected = 0.9 * (math.log(0.9) - log_q) + 0.1 * math.log(0.1)
        assert reverse_kl(*events(p, q, 1, (0,), "merged")).item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_points_away_from_what_the_teacher_finds_less_likely():
    # p = (1/2, 1/2), log q = (-24, -18) for the stop id and another: d KL / d z = p (1 - p) (log p/q differences).
    p = torch.tensor([[0.0, 0.0, -30.0]], requires_grad=True)
    q = torch.tensor([[-24.0, -18.0, 0.0]])
    (gradient,) = torch.autograd.grad(reverse_kl(*events(p, q, 2, (0,), "merged")), p)
    assert gradient[0, 0].item() == pytest.approx(0.25 * 6, abs=1e-3)


def test_a_tail_that_the_teacher_rules_out_is_as_exact():
    # 5 % outside the top k, where the teacher has e^-30: a floor of 2^-24 made half of it disappear.
    p = torch.tensor([[0.95, 0.05]]).log()
    q = torch.tensor([[math.log1p(-math.exp(-30)), -30.0]])
    expected = 0.95 * math.log(0.95) + 0.05 * (math.log(0.05) + 30)
    assert reverse_kl(*events(p, q, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_quantised_rows_hold_masses_of_any_size_and_of_none():
    q = torch.tensor([[0.0, -40.0]])
    tail, stop = torch.tensor([-30.0]), torch.tensor([-math.inf])
    topk, tail, stop = dequantise(q.half(), tail, stop)
    assert (topk[0, 1].item(), tail.item(), stop.item()) == (-40.0, -30.0, -math.inf)


@given(seeds, seeds, st.integers(1, 15), st.floats(0.5, 8))
@settings(max_examples=100, deadline=None)
def test_what_a_scorer_cannot_see_of_the_students_stops_is_bounded(a, b, k, scale):
    """A sampler's tail holds the stop ids outside the top k: the bound that the module's docstring gives."""
    p, q = (torch.log_softmax(logits(seed, scale=scale).double(), -1) for seed in (a, b))
    ids, stop_ids = p.topk(k, dim=-1).indices, (3, 7, 11)
    stops = is_stop(ids, stop_ids)
    (tail, stop), teacher = tail_and_stop(p, ids, stop_ids), tail_and_stop(q, ids, stop_ids)
    theirs = event_logprobs(q.gather(-1, ids), *teacher, stops, "merged")
    seen = event_logprobs(p.gather(-1, ids), log_add(tail, stop), None, stops, "merged")
    true = event_logprobs(p.gather(-1, ids), tail, stop, stops, "merged")
    excess = reverse_kl(seen, theirs) - reverse_kl(true, theirs)
    ratio = seen[:, -1] + theirs[:, -2] - theirs[:, -1] - seen[:, -2]
    some = stops.any(-1) & ~torch.isneginf(stop)
    bound = torch.where(some, stop.exp() * ratio.clamp(min=0), 0.0)
    assert (excess <= bound + 1e-9).all()


def test_entropy_by_hand():
    assert entropy(torch.tensor([[0.5, 0.5, 0.0]]).log()).item() == pytest.approx(math.log(2))
