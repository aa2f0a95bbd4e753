"""Generated and given tokens in one batch: a loss each, sums apart, gradients that do not mix."""

import pytest
import torch

from actors.learner.objective import make_term
from kat_ray.losses.coverage import MassCurve
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.divergence import forward_kl, tail_and_stop
from kat_ray.losses.fused_head import HeadLoss, head_loss, loss_and_gradient
from kat_ray.losses.given import WithGiven
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.policy import PolicyAndDistillation, reinforce_loss
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.losses.term import TokenRows
from tests.support.plain_engine import settings_of

STOPS, V, T, K = (3, 7), 20, 8, 5
GIVEN = torch.tensor([1, 4, 5])
OWN = torch.tensor([0, 2, 3, 6, 7])
KL = Distillation(STOPS, "merged", forward_kl)


def problem(rewards=False):
    g = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(T, V, generator=g) * 2, torch.log_softmax(torch.randn(T, V, generator=g) * 2, -1)
    ids = logits.topk(K, dim=-1).indices
    ids[GIVEN] = teacher[GIVEN].topk(K, dim=-1).indices
    tokens = torch.arange(T)
    sampled = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]
    sampled[GIVEN] = 0.0
    given = torch.zeros(T)
    given[GIVEN] = torch.tensor([0.5, 0.25, 0.25])
    rows = TokenRows(
        ids, teacher.gather(-1, ids), *tail_and_stop(teacher, ids, STOPS), tokens, sampled, torch.ones(T),
        given_weights=given,
    )  # fmt: skip
    if rewards:
        credit = torch.zeros(T)
        credit[OWN[:3]] = 1 / 3
        rows = rows._replace(advantages=torch.linspace(-1, 1, T), policy_weights=credit)
    return logits, rows


def both(opd=0.7, rl=0.0, base=KL):
    return PolicyAndDistillation(base, lambda logp, _, a, __: reinforce_loss(logp, a), None, opd, rl)


def sums_of(term, result):
    return dict(zip(term.sum_names, result.sums.tolist(), strict=True))


@pytest.mark.parametrize("loss", ["sft", "distillation"])
@pytest.mark.parametrize("rewards", [False, True])
def test_each_kind_has_its_own_loss_and_nothing_of_one_is_in_the_other(loss, rewards):
    logits, rows = problem(rewards)
    term = WithGiven(both(rl=2.0 * rewards), None if loss == "sft" else KL)
    gradient = logits.clone()
    found = loss_and_gradient(gradient, rows, term)
    alone, plain = logits[OWN].clone(), rows._replace(given_weights=None).part(OWN)
    expected = loss_and_gradient(alone, plain, term.generated)
    assert {n: s for n, s in sums_of(term, found).items() if not n.startswith("given")} == pytest.approx(
        sums_of(term.generated, expected)
    )
    assert found.maxima.tolist() == expected.maxima.tolist()
    torch.testing.assert_close(gradient[OWN], alone)
    exact, weights = logits[GIVEN].double().requires_grad_(), rows.given_weights[GIVEN].double()
    nll = -torch.log_softmax(exact, -1).gather(-1, rows.token_ids[GIVEN][:, None])[:, 0]
    if loss == "sft":
        own = (weights * nll).sum()
    else:
        given = rows._replace(given_weights=None, weights=rows.given_weights, advantages=None, policy_weights=None)
        moved = logits[GIVEN].double()
        doubled = TokenRows(*(c.double() if c.is_floating_point() else c for c in given.part(GIVEN)[:7]))
        own = loss_and_gradient(moved, doubled, KL).loss
    sums = sums_of(term, found)
    assert found.loss.item() == pytest.approx(expected.loss.item() + own.item(), rel=1e-5)
    assert sums["given_loss"] == pytest.approx(own.item(), rel=1e-5) and sums["given_tokens"] == 3
    assert sums["given_weight"] == pytest.approx(1.0) and sums["given_nll"] == pytest.approx(nll.sum().item())
    if loss == "sft":
        own.backward()
        torch.testing.assert_close(gradient[GIVEN].double(), exact.grad, atol=1e-6, rtol=1e-5)
    else:
        torch.testing.assert_close(gradient[GIVEN].double(), moved, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("loss", ["sft", "distillation"])
def test_chunks_are_the_whole(chunk, loss):
    """Also those in which all tokens are of one kind."""
    logits, rows = problem(rewards=True)
    term = WithGiven(both(rl=1.0), None if loss == "sft" else KL)

    def run(size):
        hidden = logits.clone().requires_grad_()
        result = head_loss(hidden, identity(), rows, term, size)
        result.loss.backward()
        return result.loss.detach(), result.sums, hidden.grad

    for part, whole in zip(run(chunk), run(100), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)


def test_a_batch_without_given_tokens_is_what_it_is_without_this():
    logits, rows = problem(rewards=True)
    rows = rows._replace(given_weights=None)
    term = WithGiven(both(rl=1.0), None)
    gradient, plain = logits.clone(), logits.clone()
    found, expected = (loss_and_gradient(x, rows, t) for x, t in ((gradient, term), (plain, term.generated)))
    assert torch.equal(gradient, plain) and torch.equal(found.loss, expected.loss)
    assert torch.equal(found.sums[:-5], expected.sums) and not found.sums[-5:].any()


def test_a_given_token_without_a_finite_loss_is_dropped_and_counted():
    logits, rows = problem()
    logits[4, 4] = -torch.inf  # the student cannot say it
    term = WithGiven(both(), None)
    gradient = logits.clone()
    sums = sums_of(term, loss_and_gradient(gradient, rows, term))
    assert (sums["given_tokens"], sums["given_dropped"], sums["given_weight"]) == (2, 1, 0.75)
    assert (gradient[4] == 0).all()


def test_without_a_teacher_there_is_cross_entropy_beside_rewards():
    logits, rows = problem(rewards=True)
    none = torch.zeros(T, 0)
    rows = rows._replace(topk_ids=none.long(), teacher_topk=none, teacher_tail=torch.zeros(T))
    term = WithGiven(both(0.0, 1.0, StudentStatistics(STOPS)), None)
    sums = sums_of(term, loss_and_gradient(logits.clone(), rows, term))
    assert sums["tokens"] == 3 and sums["given_tokens"] == 3


def test_the_curve_of_masses_is_of_generated_tokens():
    logits, rows = problem()
    curve, expected = MassCurve(V), MassCurve(V)
    HeadLoss(identity(), WithGiven(both(), None), 100, curve)(logits, rows)
    expected.add(logits[OWN])
    assert curve.take() == pytest.approx(expected.take())


def test_the_configuration_names_it():
    def term(**off_policy):
        return make_term(settings_of({"opd": {"divergence": "forward"}, "off_policy": off_policy}))

    assert isinstance(term(), Distillation), "a run without completions is as ever"
    sft, distils = term(share=0.5, loss="sft"), term(share=0.5)
    assert isinstance(sft, WithGiven) and sft.distillation is None
    assert distils.distillation.divergence is forward_kl and distils.generated.opd_weight == 1.0


def identity():
    head = torch.nn.Linear(V, V, bias=False)
    head.weight.data.copy_(torch.eye(V))
    return OutputLayer(head)
