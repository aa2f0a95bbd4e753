"""The policy's loss without a teacher: by hand, and against autograd through the whole distribution."""

import math

import pytest
import torch

from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.policy import PolicyAndDistillation, clip_loss
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.losses.term import TokenRows

STOPS = (1, 3)
CLIP = {"low": 0.2, "high": 0.28, "dual": 3.0}
TERM = PolicyAndDistillation(
    StudentStatistics(STOPS), lambda p, q, a, _: clip_loss(p, q, a, **CLIP), None, 0.0, 1.5
)


def rows_of(ids, sampled, advantages=None, weights=None):
    n = len(ids)
    return TokenRows(
        topk_ids=torch.zeros(n, 0, dtype=torch.long), teacher_topk=torch.zeros(n, 0), teacher_tail=torch.zeros(n),
        teacher_stop=torch.full((n,), -math.inf), token_ids=torch.tensor(ids, dtype=torch.long),
        sampled_logprobs=torch.tensor(sampled),
        weights=torch.zeros(n), advantages=advantages, policy_weights=weights,
    )  # fmt: skip


def layer_of(logits):
    """An output layer that gives these logits [T, V] to the rows of the identity."""
    head = torch.nn.Linear(logits.shape[0], logits.shape[1], bias=False)
    head.weight.data = logits.T.contiguous()
    return OutputLayer(head)


def test_values_by_hand():
    """Two tokens of a vocabulary of 4, p = (1/2, 1/4, 1/8, 1/8); the second token has no weight."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    rows = rows_of([0, 2], [math.log(0.4), -9.0], torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.0]))
    found = head_loss(torch.eye(2), layer_of(p.log().repeat(2, 1)), rows, TERM, 1)
    sums, maxima = dict(zip(TERM.sum_names, found.sums.tolist(), strict=True)), found.maxima.tolist()
    assert sums["tokens"] == sums["policy_tokens"] == 1
    assert sums["entropy"] == pytest.approx(math.log(2)) and sums["stop_mass"] == pytest.approx(0.375)
    assert sums["logprob_diff"] == pytest.approx(math.log(1.25)) == maxima[0] and sums["kl_loss"] == 0
    assert sums["policy_loss"] == pytest.approx(0.5 * -2.0 * 1.25) and maxima[1] == pytest.approx(1.25)
    assert found.loss.item() == pytest.approx(1.5 * sums["policy_loss"])


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_value_and_gradient_are_those_of_the_plain_loss(chunk):
    torch.manual_seed(0)
    n, vocabulary = 7, 11
    logits = torch.randn(n, vocabulary)
    ids = torch.randint(vocabulary, (n,))
    sampled = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0] + 0.2 * torch.randn(n)
    advantage, weight = torch.randn(n), torch.rand(n)
    rows = rows_of(ids.tolist(), sampled.tolist(), advantage, weight)
    hidden = torch.eye(n, requires_grad=True)
    layer = layer_of(logits)
    result = head_loss(hidden, layer, rows, TERM, chunk)
    result.loss.backward()
    plain = layer.head.weight.detach().clone().requires_grad_()
    logp = torch.log_softmax(torch.eye(n) @ plain.T, -1).gather(1, ids[:, None])[:, 0]
    expected = 1.5 * (weight * clip_loss(logp, sampled, advantage, 0.2, 0.28, 3.0).loss).sum()
    expected.backward()
    assert float(result.loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(layer.head.weight.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_a_pass_that_counts_nothing_has_gradients_of_zero_or_none_that_are_finite():
    """As of a rank that has run out of work, and of a step that is to be skipped."""
    for factor, finite in ((0.0, True), (math.nan, False)):
        hidden = torch.ones(1, 1, requires_grad=True)
        found = head_loss(hidden, layer_of(torch.tensor([[0.0, 1.0, -5.0]])), rows_of([0], [-1.0]), TERM, 1)
        (found.loss * factor).backward()
        assert found.sums.tolist() == [0.0] * len(TERM.sum_names) and float(found.loss) == 0
        assert bool((hidden.grad == 0).all()) is finite and bool(hidden.grad.isnan().all()) is not finite


def test_no_tokens():
    found = head_loss(torch.zeros(0, 2), layer_of(torch.zeros(2, 4)), rows_of([], []), TERM, 4)
    assert float(found.loss) == 0 and not found.sums.any()
