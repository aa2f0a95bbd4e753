"""What the top k leaves out, by hand and against the definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kat_ray.losses.coverage import MassCurve, coarser_kl, hidden_kl
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import event_logprobs, full_reverse_kl, is_stop, log_add, reverse_kl, tail_and_stop
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.term import TokenRows


def test_the_curve_by_hand():
    curve = MassCurve(6)
    assert curve.sizes == (1, 2, 4, 6)
    curve.add(torch.tensor([[0.05, 0.5, 0.1, 0.05, 0.2, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]).log())
    sums = curve.take()
    assert sums == pytest.approx([1.5, 1.7, 1.9, 2.0, 2.0], abs=1e-6), "0.5 0.7 0.9 1 and 1 1 1 1, of two tokens"
    assert curve.take() == [0.0] * 5
    assert curve.size_for(sums, 0.7) == 1 and curve.size_for(sums, 0.845) == 2
    assert curve.size_for(sums, 0.9) == math.ceil(2 * 2**0.5), "half-way from 0.85 at 2 to 0.95 at 4"
    assert curve.size_for(sums, 0.99) == 6 and curve.size_for([0.0] * 5, 0.99) is None


def test_tokens_that_are_not_finite_or_do_not_count_are_left_out():
    curve = MassCurve(4)
    curve.add(torch.tensor([[0.0, math.nan, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    curve.counts = False
    curve.add(torch.zeros(3, 4))
    curve.counts = True
    curve.add(torch.zeros(0, 4))
    assert curve.take() == [0.25, 0.5, 1.0, 1.0]


def test_masses_are_those_of_a_softmax_and_add_up_over_chunks():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    whole, parts = MassCurve(50), MassCurve(50)
    whole.add(logits)
    for part in logits.split(7):
        parts.add(part)
    sums = whole.take()
    assert parts.take() == pytest.approx(sums)
    for size, mass in zip(whole.sizes, sums, strict=False):
        best = logits.double().softmax(-1).topk(size, dim=-1).values.sum()
        assert mass == pytest.approx(best.item(), rel=1e-5)


def a_step(logits, teacher, k, eos, stops=(3, 4)):
    """Sums of the term over all rows, the student's logits made by an output layer that copies them."""
    q = torch.log_softmax(teacher, -1)
    ids = logits.topk(k, dim=-1).indices
    count = len(logits)
    rows = TokenRows(
        ids, q.gather(-1, ids), *tail_and_stop(q, ids, stops), ids[:, 0], torch.zeros(count), torch.ones(count)
    )
    layer = torch.nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(logits.shape[1]))
    term = Distillation(stops, eos)
    result = head_loss(logits, OutputLayer(layer), rows, term, 8)
    return dict(zip(term.sum_names, result.sums.tolist(), strict=True)), result


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
def test_the_coarser_kl_is_that_of_a_quarter_of_the_top_k(eos):
    g = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(30, 60, generator=g) * 2, torch.randn(30, 60, generator=g) * 2
    sums, result = a_step(logits, teacher, 16, eos)
    quarter, _ = a_step(logits, teacher, 4, eos)
    assert sums["kl"] == pytest.approx(result.loss.item(), rel=1e-5)
    assert sums["coarser_kl"] == pytest.approx(quarter["kl"], rel=1e-4)
    assert sums["coarser_tail_mass"] == pytest.approx(quarter["tail_mass"], rel=1e-4)


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from(["raw", "merged"]))
def test_a_coarser_partition_sees_no_more(seed, k, eos):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.log_softmax(torch.randn(5, 12, generator=g) * 2, -1) for _ in "pq")
    ids = p.topk(k, dim=-1).indices
    stops = is_stop(ids, (2, 5))
    own, given = ((x.gather(-1, ids), *tail_and_stop(x, ids, (2, 5))) for x in (p, q))
    events = [event_logprobs(*parts, stops, eos) for parts in (own, given)]
    coarser, mass = coarser_kl(own, given, stops, eos)
    assert (mass >= log_add(own[1], own[2]).exp() - 1e-6).all()
    if eos == "raw":  # merged: which rows have a STOP event depends on the ids that are listed
        assert (coarser <= reverse_kl(*events) + 1e-5).all()


def test_the_hidden_kl_by_hand():
    # From a tail of 0.4 to one of 0.1 the KL grew by 0.3: 1 nat a unit of mass, and 0.1 is left.
    assert hidden_kl(0.8, 0.1, 0.5, 0.4) == pytest.approx(0.1)
    assert hidden_kl(0.8, 0.1, 0.9, 0.4) == 0.0 and hidden_kl(0.8, 0.1, 0.5, 0.1) == 0.0


def test_the_estimate_comes_near_the_vocabulary_where_noise_is_everywhere():
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(200, 2000, generator=g) * 1.5
    logits = teacher + torch.randn(200, 2000, generator=g)
    sums, _ = a_step(logits, teacher, 64, "raw")
    means = {name: sums[name] / 200 for name in ("kl", "tail_mass", "coarser_kl", "coarser_tail_mass")}
    full = full_reverse_kl(logits, teacher).mean().item()
    found = means["kl"] + hidden_kl(*means.values())
    assert means["tail_mass"] > 0.3 and means["kl"] < 0.85 * full
    assert abs(found - full) < 0.5 * (full - means["kl"])
