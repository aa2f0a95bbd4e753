"""Distillation at temperatures: events, value and gradient are those of both distributions over the vocabulary."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.learner.logprob_log import LogprobLog
from actors.learner.objective import make_term
from kat_ray.config import Config
from kat_ray.losses.coverage import MassCurve
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
from kat_ray.losses.fused_head import HeadLoss, head_loss, loss_and_gradient
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.policy import PolicyAndDistillation, reinforce_loss
from kat_ray.losses.term import TokenRows, temperature_of
from tests.support.gradients import of_events
from tests.support.plain_engine import settings_of

STOPS, V, H, T = (3, 7), 20, 5, 9
KINDS = {
    "reverse": reverse_kl, "forward": forward_kl, "jsd": partial(generalised_jsd, beta=0.3),
    "skewed forward": partial(skewed_forward_kl, alpha=0.1),
    "skewed reverse": partial(skewed_reverse_kl, alpha=0.1),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.0), (2.0, 0.7), (1.5, 1.5)])


def logits(seed, rows=T, dtype=torch.float64):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def events_of(logits_NV, ids, temperature, eos):
    """The masses of ids, summed over the whole vocabulary of softmax(logits / T)."""
    tempered = torch.log_softmax(logits_NV / temperature, -1)
    outside = tail_and_stop(tempered, ids, STOPS)
    return event_logprobs(tempered.gather(-1, ids), *outside, is_stop(ids, STOPS), eos)


def problem(k=6, temperature=1.0, seed=5):
    """The student's logits, the teacher's, and the rows of a scorer that takes the teacher at this temperature."""
    p, q = logits(seed, dtype=torch.float32), logits(seed + 1, dtype=torch.float32)
    learnt = torch.log_softmax(q / temperature, -1)
    ids, tokens = p.topk(k, dim=-1).indices, torch.arange(T)
    sampled = torch.log_softmax(p, -1).gather(-1, tokens[:, None])[:, 0] + 0.1
    weights = torch.tensor([1.0, 2, 0, 1, 1, 1, 1, 1, 1])
    return (
        p,
        q,
        TokenRows(ids, learnt.gather(-1, ids), *tail_and_stop(learnt, ids, STOPS), tokens, sampled, weights),
    )


@kinds
@both
@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
@pytest.mark.parametrize("k", [1, 6, V])
def test_value_and_gradient_are_those_of_the_definition(kind, temperatures, eos, k):
    own, other = temperatures
    p, q, rows = problem(k, other)
    ours, theirs = p.clone(), p.double().requires_grad_()
    found = loss_and_gradient(ours, rows, Distillation(STOPS, eos, KINDS[kind], own))
    sides = (events_of(x, rows.topk_ids, t, eos) for x, t in ((theirs, own), (q.double(), other)))
    expected = (rows.weights.double() * KINDS[kind](*sides)).sum()
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(ours.double(), theirs.grad, atol=1e-5, rtol=1e-4)


@kinds
def test_gradient_by_finite_differences(kind):
    """Of the head itself, in float64."""
    p, _, rows = problem(temperature=2.0)
    rows = TokenRows(*(column.double() if column.is_floating_point() else column for column in rows[:7]))
    term, gradient, step = Distillation(STOPS, "merged", KINDS[kind], 1.7), p.double(), 1e-5
    loss_and_gradient(gradient, rows, term)
    for row, token in ((0, 3), (1, 11), (4, int(rows.topk_ids[4, 0])), (8, 8)):
        moved = []
        for sign in (1, -1):
            logits_CV = p.double()
            logits_CV[row, token] += sign * step
            moved.append(loss_and_gradient(logits_CV, rows, term, gradient=False).loss.item())
        assert gradient[row, token].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-7)


@kinds
@both
@given(st.integers(0, 10_000), st.integers(1, V), st.sampled_from(["raw", "merged", "mask"]))
@settings(max_examples=20, deadline=None)
def test_it_is_never_negative_and_below_the_whole_vocabularys(kind, temperatures, seed, k, eos):
    p, q = logits(seed), logits(seed + 1)
    ids = p.topk(k, dim=-1).indices
    sides = [events_of(x, ids, t, eos) for x, t in zip((p, q), temperatures, strict=True)]
    value = KINDS[kind](*sides)
    assert (value >= -1e-12).all()
    whole = [torch.log_softmax(x / t, -1) for x, t in zip((p, q), temperatures, strict=True)]
    assert eos == "mask" or (value <= KINDS[kind](*whole) + 1e-9).all()
    assert (KINDS[kind](sides[0], sides[0]) == 0).all()


def test_two_models_that_differ_by_their_temperature_alone_agree():
    """q(v) ~ p(v)^2: at a student's temperature of 1/2 nothing is left to learn."""
    p, _, _ = problem()
    learnt, ids = torch.log_softmax(2 * p, -1), p.topk(6, dim=-1).indices
    rows = TokenRows(
        ids, learnt.gather(-1, ids), *tail_and_stop(learnt, ids, STOPS), ids[:, 0], learnt[:, 0], torch.ones(T)
    )
    gradient = p.clone()
    found = loss_and_gradient(gradient, rows, Distillation(STOPS, "merged", forward_kl, 0.5))
    assert abs(found.loss.item()) < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_are_the_whole_and_without_autograd_the_value_is_the_same(chunk):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    _, _, rows = problem(temperature=2.0)
    term = Distillation(STOPS, "merged", KINDS["jsd"], 0.6)

    def run(size):
        head = torch.nn.Linear(H, V, bias=False)
        head.weight.data.copy_(weight)
        own = hidden.clone().requires_grad_()
        result = head_loss(own, OutputLayer(head), rows, term, size)
        result.loss.backward()
        with torch.no_grad():
            alone = head_loss(hidden, OutputLayer(head), rows, term, size)
        assert torch.equal(alone.loss, result.loss.detach()) and torch.equal(alone.sums, result.sums)
        return result.loss.detach(), result.sums, own.grad, head.weight.grad

    for part, whole in zip(run(chunk), run(100), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-6)


def test_what_is_counted_of_the_student_is_at_temperature_1_but_for_the_tail():
    p, _, rows = problem()
    sums = {}
    for temperature in (1.0, 3.0):
        term = Distillation(STOPS, "merged", temperature=temperature)
        found = loss_and_gradient(p.clone(), rows, term)
        sums[temperature] = dict(zip(term.sum_names, found.sums.tolist(), strict=True))
    for name in ("tokens", "weight", "logprob_diff", "entropy", "stop_mass"):
        assert sums[3.0][name] == sums[1.0][name], name
    tail = torch.softmax(p.double() / 3.0, -1).scatter(-1, rows.topk_ids, 0.0).sum(-1)[rows.weights > 0].sum()
    assert sums[3.0]["tail_mass"] == pytest.approx(tail.item(), rel=1e-5)
    curve = MassCurve(V)
    HeadLoss(_identity(), Distillation(STOPS, "raw", temperature=3.0), 100, curve)(p, rows)
    expected = MassCurve(V)
    expected.add(p / 3.0)
    assert curve.take() == pytest.approx(expected.take())


def test_beside_rewards_the_policy_is_at_temperature_1_and_pulls_are_told_apart():
    p, _, rows = problem(temperature=0.5)
    advantages = torch.linspace(-1, 1, T)
    rows = rows._replace(advantages=advantages, policy_weights=torch.full((T,), 1 / T))
    kl = Distillation(STOPS, "merged", temperature=2.0)

    def gradient(opd, rl):
        term, logits_CV = PolicyAndDistillation(kl, _reinforce, None, opd, rl), p.clone()
        return loss_and_gradient(logits_CV, rows, term), logits_CV

    (found, both_), (_, policy), (_, distilled) = gradient(0.3, 2.0), gradient(0.0, 2.0), gradient(0.3, 0.0)
    torch.testing.assert_close(both_, policy + distilled)
    exact = p.double().requires_grad_()
    logp = torch.log_softmax(exact, -1).gather(-1, rows.token_ids[:, None])[:, 0]
    (-2.0 * advantages * logp / T).sum().backward()
    torch.testing.assert_close(policy.double(), exact.grad, atol=1e-6, rtol=1e-5)
    names = PolicyAndDistillation(kl, _reinforce, None, 0.3, 2.0).sum_names
    sums = dict(zip(names, found.sums.tolist(), strict=True))
    assert sums["policy_pull"] == pytest.approx(policy.abs().sum().item(), rel=1e-5)
    assert sums["kl_pull"] == pytest.approx(distilled.abs().sum().item(), rel=1e-5)
    policy, distilled = (of_events(g.double(), rows.topk_ids, STOPS) for g in (policy, distilled))
    assert sums["gradient_product"] == pytest.approx((policy * distilled).sum().item(), rel=1e-4)


def test_the_configuration_names_them_and_what_watches_a_term_passes_them_on():
    plain = make_term(settings_of({"opd": {"teacher_temperature": 2.0}}))
    assert temperature_of(plain) == 1.0, "the teacher's is the scorer's affair"
    beside = make_term(settings_of({"opd": {"student_temperature": 2.0}, "rl": {"weight": 1.0}}))
    assert temperature_of(beside) == 2.0 == temperature_of(LogprobLog().watched(beside))


def test_a_teacher_on_vllm_has_temperature_1():
    tree = {
        "student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "x.jsonl"},
        "scorer": {"backend": "vllm", "num_gpus": 1}, "objective": {"opd": {"teacher_temperature": 2.0}},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"teacher_temperature = 2: .* set scorer\.backend = 'transformers'"):
        Config.model_validate(tree)
    tree["objective"] = {"opd": {"student_temperature": 2.0}}
    Config.model_validate(tree)


def _reinforce(logp, anchor, advantage, sequence):
    return reinforce_loss(logp, advantage)


def _identity():
    head = torch.nn.Linear(V, V, bias=False)
    head.weight.data.copy_(torch.eye(V))
    return OutputLayer(head)
