"""Forward KL and the generalised Jensen-Shannon divergence beside reverse KL: by hand, in full, and as a loss."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.learner.objective import make_term
from kat_ray.config.objective import DistillationObjective
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import (
    event_logprobs,
    forward_kl,
    generalised_jsd,
    is_stop,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    tail_and_stop,
)
from kat_ray.losses.fused_head import loss_and_gradient
from kat_ray.losses.term import TokenRows
from tests.support.plain_engine import settings_of

STOPS, V = (3, 7), 20
KINDS = {
    "reverse": reverse_kl, "forward": forward_kl, "jsd": partial(generalised_jsd, beta=0.5),
    "jsd 0.1": partial(generalised_jsd, beta=0.1), "jsd 0.9": partial(generalised_jsd, beta=0.9),
    "skewed forward": partial(skewed_forward_kl, alpha=0.1),
    "skewed reverse": partial(skewed_reverse_kl, alpha=0.1),
    "skewed reverse 0.7": partial(skewed_reverse_kl, alpha=0.7),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def full(kind, p_logits, q_logits):
    """The definition over the whole vocabulary, in float64."""
    p, q = (torch.softmax(x.double(), -1) for x in (p_logits, q_logits))

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if kind in ("reverse", "forward"):
        return kl(p, q) if kind == "reverse" else kl(q, p)
    if kind.startswith("skewed"):
        alpha, (one, other) = KINDS[kind].keywords["alpha"], (q, p) if "forward" in kind else (p, q)
        return kl(one, alpha * one + (1 - alpha) * other)
    beta = KINDS[kind].keywords["beta"]
    middle = beta * q + (1 - beta) * p
    return beta * kl(q, middle) + (1 - beta) * kl(p, middle)


def events(p_logits, q_logits, k, eos="raw"):
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    ids = p.topk(k, dim=-1).indices
    stops = is_stop(ids, STOPS)
    return tuple(event_logprobs(x.gather(-1, ids), *tail_and_stop(x, ids, STOPS), stops, eos) for x in (p, q))


def logits(seed, rows=6, scale=2.0, dtype=torch.float64):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert forward_kl(p, q).item() == pytest.approx(0.25 * math.log(2))
    # The middle of both is (3/8, 1/4, 3/8), as far from one as from the other.
    assert generalised_jsd(p, q, 0.5).item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))
    # With a quarter of the teacher it is (7/16, 1/4, 5/16).
    teacher = 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)
    student = 0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)
    assert generalised_jsd(p, q, 0.25).item() == pytest.approx(0.25 * teacher + 0.75 * student)


def test_distributions_that_share_nothing_are_log_2_apart():
    p, q = torch.tensor([[1.0, 0.0, 0.0]]).log(), torch.tensor([[0.0, 1.0, 0.0]]).log()
    p.requires_grad_()
    value = generalised_jsd(p, q, 0.5)
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    value.sum().backward()
    assert torch.isfinite(p.grad).all()
    assert forward_kl(p, q).item() == math.inf == reverse_kl(p, q).item()
    for skewed in (skewed_forward_kl, skewed_reverse_kl):  # what it mixes in is all that they share
        p.grad = None
        value = skewed(p, q, 0.25)
        assert value.item() == pytest.approx(math.log(4), rel=1e-6)
        value.sum().backward()
        assert torch.isfinite(p.grad).all()


@kinds
@given(st.integers(0, 10_000), st.integers(1, V - 1), st.sampled_from(["raw", "merged", "mask"]), st.floats(0.1, 8))
@settings(max_examples=60, deadline=None)
def test_laws(kind, seed, k, eos, scale):
    p, q = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    value = KINDS[kind](*events(p, q, k, eos))
    assert (value >= -1e-12).all() and torch.isfinite(value).all()
    if eos != "mask":
        assert (value <= full(kind, p, q) + 1e-9).all(), "data processing: events see no more than the vocabulary"
    same, _ = events(p, q, k, eos)
    assert (KINDS[kind](same, same) == 0).all(), "exactly"
    own, given_ = events(p.float(), q.float(), k, eos)
    assert (KINDS[kind](own, given_) >= -1e-6).all()
    torch.testing.assert_close(KINDS[kind](own, given_).double(), value, atol=2e-5, rtol=2e-4)


@kinds
def test_all_but_one_token_on_their_own_are_the_whole_vocabulary(kind):
    p, q = logits(0), logits(1)
    torch.testing.assert_close(KINDS[kind](*events(p, q, V - 1)), full(kind, p, q), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_at_its_ends_the_mixture_goes_the_way_of_either_kl(beta):
    p, q = events(logits(0), logits(1), 8)
    ends = (forward_kl, beta) if beta < 0.5 else (reverse_kl, 1 - beta)
    torch.testing.assert_close(generalised_jsd(p, q, beta) / ends[1], ends[0](p, q), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("skewed", "end"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)])
def test_with_nothing_mixed_in_a_skewed_kl_is_the_kl(skewed, end):
    p, q = events(logits(0), logits(1), 8)
    torch.testing.assert_close(skewed(p, q, 1e-9), end(p, q), atol=1e-6, rtol=1e-6)


def test_skewed_kls_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    # A quarter of the teacher in the student is (7/16, 1/4, 5/16), of the student in the teacher (5/16, 1/4, 7/16).
    assert skewed_forward_kl(p, q, 0.25).item() == pytest.approx(0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5))
    assert skewed_reverse_kl(p, q, 0.25).item() == pytest.approx(0.5 * math.log(8 / 5) + 0.25 * math.log(4 / 7))


@kinds
def test_gradient_by_finite_differences(kind):
    p, q = logits(2, rows=3), logits(3, rows=3)
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KINDS[kind](*events(x, q, 6, "merged")), (p,), atol=1e-7)


def problem(k=6, nan=()):
    p, q = logits(5, rows=9, dtype=torch.float32), torch.log_softmax(logits(6, rows=9, dtype=torch.float32), -1)
    ids = p.topk(k, dim=-1).indices
    topk = q.gather(-1, ids)
    for row in nan:
        topk[row, 0] = torch.nan
    tokens = torch.arange(9)
    sampled = torch.log_softmax(p, -1).gather(-1, tokens[:, None])[:, 0]
    weights = torch.tensor([1.0, 2, 0, 1, 1, 1, 1, 1, 1])
    return p, q, TokenRows(ids, topk, *tail_and_stop(q, ids, STOPS), tokens, sampled, weights)


@kinds
@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
@pytest.mark.parametrize("k", [1, 6, V])
def test_the_head_has_value_and_gradient_of_the_definition(kind, eos, k):
    p, q, rows = problem(k)
    ours, theirs = p.clone(), p.clone().double().requires_grad_()
    result = loss_and_gradient(ours, rows, Distillation(STOPS, eos, KINDS[kind]))
    lost = (rows.weights.double() * KINDS[kind](*events(theirs, q.double(), k, eos))).sum()
    lost.backward()
    assert result.loss.item() == pytest.approx(lost.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(ours.double(), theirs.grad, atol=1e-5, rtol=1e-4)


@kinds
def test_a_masked_nan_adds_nothing_and_what_is_counted_is_the_reverse_kl(kind):
    p, _, rows = problem(nan=(4,))
    kept = torch.tensor([i for i in range(9) if i != 4])
    whole, part = p.clone(), p[kept].clone()
    term = Distillation(STOPS, "merged", KINDS[kind])
    result, expected = loss_and_gradient(whole, rows, term), loss_and_gradient(part, rows.part(kept), term)
    assert result.loss.item() == pytest.approx(expected.loss.item())
    assert (whole[4] == 0).all() and torch.allclose(whole[kept], part)
    sums = dict(zip(term.sum_names, result.sums.tolist(), strict=True))
    plain = loss_and_gradient(p.clone(), rows, Distillation(STOPS, "merged"))
    assert sums == dict(zip(term.sum_names, plain.sums.tolist(), strict=True)) and sums["dropped"] == 1


def test_a_token_that_only_the_mixture_can_compare_has_its_loss_and_no_kl():
    """The teacher gives no mass to the student's most likely id: reverse KL is infinite there, and drops it."""
    p, _, rows = problem()
    topk = rows.teacher_topk.clone()
    topk[2:4, 0] = -math.inf  # of a token without weight, and of one with
    rows = rows._replace(teacher_topk=topk)
    found = {}
    for kind in ("reverse", "jsd"):
        term = Distillation(STOPS, "raw", KINDS[kind])
        result = loss_and_gradient(p.clone(), rows, term)
        found[kind] = dict(zip(term.sum_names, result.sums.tolist(), strict=True)) | {"loss": result.loss.item()}
    assert math.isfinite(found["jsd"]["loss"]) and (found["reverse"]["dropped"], found["jsd"]["dropped"]) == (1, 0)
    assert found["jsd"]["kl"] == pytest.approx(found["reverse"]["kl"]) and found["jsd"]["tokens"] == 8


def test_the_configuration_names_them():
    def divergence(**opd):
        return make_term(settings_of({"opd": opd})).divergence

    assert divergence() is reverse_kl and divergence(divergence="forward") is forward_kl
    jsd = divergence(divergence="jsd", beta=0.25)
    assert jsd.func is generalised_jsd and jsd.keywords == {"beta": 0.25}
    for name, kind in (("skewed_forward", skewed_forward_kl), ("skewed_reverse", skewed_reverse_kl)):
        skewed = divergence(divergence=name, skew_alpha=0.3)
        assert skewed.func is kind and skewed.keywords == {"alpha": 0.3}
    beside = make_term(settings_of({"opd": {"divergence": "forward"}, "rl": {"weight": 1.0}}))
    assert beside.distillation.divergence is forward_kl


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"beta": 0.3}, "beta = 0.3: is of divergence = 'jsd', and divergence is 'reverse'"),
        ({"divergence": "jsd", "beta": 1.0}, "less than 1"),
        ({"divergence": "js"}, "'reverse', 'forward', 'jsd', 'skewed_forward' or 'skewed_reverse'"),
        ({"divergence": "jsd", "skew_alpha": 0.2}, "skew_alpha = 0.2: is of divergence = 'skewed_forward' or "),
        ({"divergence": "skewed_reverse", "skew_alpha": 0.0}, "greater than 0"),
        ({"teacher_temperature": 0.0}, "greater than 0"),
    ],
)
def test_mistakes_are_one_message(values, told):
    with pytest.raises(ValueError, match=told):
        DistillationObjective.model_validate(values)
