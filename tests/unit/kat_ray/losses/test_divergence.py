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
    entropy,
    event_logprobs,
    full_reverse_kl,
    is_stop,
    log1mexp,
    reverse_kl,
    stop_mass,
    tail_from_logprobs,
    tail_from_topk,
)


def events(p_logits, q_logits, k, stop_ids=(), eos="raw", exact_stop=True):
    """Event log-probabilities of both models, as learner and scorer compute them."""
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    ids = p.topk(k, dim=-1).indices
    stops = is_stop(ids, stop_ids)
    return tuple(
        event_logprobs(
            x.gather(-1, ids),
            tail_from_logprobs(x, ids),
            stop_mass(x, stop_ids) if exact_stop else None,
            stops,
            eos,
        )
        for x in (p, q)
    )


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
    exact = tail_from_logprobs(p, ids)
    assert (exact >= LOG_FLOOR).all()
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


def test_entropy_by_hand():
    assert entropy(torch.tensor([[0.5, 0.5, 0.0]]).log()).item() == pytest.approx(math.log(2))
