"""Losses of tokens from an advantage, on an example derived by hand.

One prompt, four answers of 2, 1, 3 and 2 tokens. The old policy has 0.4 everywhere; the ratios of the new one to it
are RHO, those of the old one to the sampler's W.
"""

import pytest
import torch

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.fused_head import head_loss, loss_and_gradient
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.policy import (
    PolicyAndDistillation,
    cispo_loss,
    clip_loss,
    gradient_pulls,
    gspo_loss,
    interval_weight,
    reinforce_loss,
    sequence_mask_weight,
    truncated_weight,
)
from kat_ray.losses.term import StudentLogprobs, TokenRows
from tests.support.gradients import of_events

LENGTHS = torch.tensor([2, 1, 3, 2])
RHO = torch.tensor([1.5, 0.9, 0.5, 1.1, 1.0, 0.7, 1.25, 2.0], dtype=torch.float64)
W = torch.tensor([1.0, 3.0, 0.4, 1.0, 1.2, 0.9, 2.5, 1.0], dtype=torch.float64)
OLD = torch.full((8,), 0.4, dtype=torch.float64).log()
NEW = OLD + RHO.log()
GRPO = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64).repeat_interleave(LENGTHS)
RLOO = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64).repeat_interleave(LENGTHS)
EXACT = {"abs": 1e-9, "rel": 1e-7}


def by_rollout(values):
    """Means over each answer's tokens, repeated for each of them."""
    means = torch.stack([part.mean() for part in values.split(LENGTHS.tolist())])
    return means.repeat_interleave(LENGTHS)


def sequence_mean(values):
    return float(torch.stack([part.mean() for part in values.split(LENGTHS.tolist())]).mean())


def ppo(high=0.2, dual=None):
    return clip_loss(NEW, OLD, GRPO, 0.2, high, dual).loss


def test_clipped_losses_token_by_token():
    assert ppo().tolist() == pytest.approx([-1.8, -1.35, 0.4, 0.55, 0.5, 0.4, 0.625, 1.0])
    assert ppo(0.28)[0] == pytest.approx(-1.92) and ppo(0.28, dual=1.5)[-1] == pytest.approx(0.75)
    for loss, mean in ((ppo(), 0.040625), (ppo(0.28), 0.025625), (ppo(0.28, 1.5), -0.005625)):
        assert float(loss.mean()) == pytest.approx(mean, **EXACT)
    assert float(clip_loss(NEW, OLD, RLOO, 0.2, 0.2).loss.mean()) == pytest.approx(0.027083333, abs=1e-9)
    assert float(reinforce_loss(NEW, RLOO).loss.mean()) == pytest.approx(-0.039105625, abs=1e-9)


def test_where_the_ratio_was_held():
    found = clip_loss(NEW, OLD, GRPO, 0.2, 0.28, 1.5)
    assert found.clipped_high.nonzero().flatten().tolist() == [0, 7]  # too good already; bounded by `dual`
    assert found.clipped_low.nonzero().flatten().tolist() == [2, 5]


def test_gradients_in_the_log_probabilities():
    logp = NEW.clone().requires_grad_()
    clip_loss(logp, OLD, GRPO, 0.2, 0.2).loss.mean().backward()
    assert logp.grad.tolist() == pytest.approx([0, -0.16875, 0, 0.06875, 0.0625, 0, 0.078125, 0.125])
    logp = NEW.clone().requires_grad_()
    cispo_loss(logp, OLD, GRPO, 0.2, 0.28).loss.mean().backward()
    assert logp.grad.tolist() == pytest.approx([-0.24, -0.16875, 0.05, 0.06875, 0.0625, 0.05, 0.078125, 0.08])


def test_one_ratio_for_a_whole_answer():
    sequence = by_rollout(NEW - OLD)
    assert sequence.exp()[[0, 2, 3, 6]].tolist() == pytest.approx([1.161895, 0.5, 0.916566, 1.581139], abs=1e-6)
    assert sequence_mean(gspo_loss(NEW, sequence, GRPO, 0.2, 0.2).loss) == pytest.approx(-0.023497567, abs=1e-9)
    token_mean = float(gspo_loss(NEW, sequence, GRPO, 0.2, 0.2).loss.mean())
    assert token_mean == pytest.approx(-0.016212214, abs=1e-9), "another number, which the configuration refuses"
    assert sequence_mean(gspo_loss(NEW, sequence, GRPO, 3e-4, 4e-4).loss) == pytest.approx(0.072417354, abs=1e-9)
    logp = NEW.clone().requires_grad_()
    loss = gspo_loss(logp, sequence, GRPO, 0.2, 0.2).loss
    torch.stack([part.mean() for part in loss.split(LENGTHS.tolist())]).mean().backward()
    expected = [-0.217855, -0.217855, 0, 0.038190, 0.038190, 0.038190, 0.098821, 0.098821]
    assert logp.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_ratio_that_is_held_and_lets_the_gradient_pass():
    assert float(cispo_loss(NEW, OLD, GRPO, 0.2, 0.28).loss.mean()) == pytest.approx(-0.034832573, abs=1e-9)
    assert float(cispo_loss(NEW, OLD, GRPO, 1.0, 4.0).loss.mean()) == pytest.approx(0.014330521, abs=1e-9)


def test_corrections_of_the_sampler():
    truncated = truncated_weight(W.log(), 2.0)
    assert truncated.tolist() == pytest.approx([1, 2, 0.4, 1, 1.2, 0.9, 2, 1])
    assert float((ppo() * truncated).mean()) == pytest.approx(-0.0725)
    inside = interval_weight(W.log(), 0.5, 2.0)
    assert inside.tolist() == pytest.approx([1, 0, 0, 1, 1.2, 0.9, 0, 1])
    assert float((ppo() * inside).mean()) == pytest.approx(0.08875), "over all tokens, as ours is"
    assert float((ppo() * inside).sum() / (inside > 0).sum()) == pytest.approx(0.142), "over those that are kept"
    product = torch.stack([part.log().sum() for part in W.split(LENGTHS.tolist())]).repeat_interleave(LENGTHS)
    assert product.exp()[[0, 2, 3, 6]].tolist() == pytest.approx([3, 0.4, 1.08, 2.5])
    cap = 3.0 + 1e-9  # the first one's product is 3
    assert float((ppo() * interval_weight(product, 0.0, cap)).mean()) == pytest.approx(-0.4576875)
    geometric = sequence_mask_weight(by_rollout(W.log()), 0.5, 2.0)
    assert geometric.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert float((ppo() * geometric * truncated).mean()) == pytest.approx(-0.0925)


def test_no_gradient_goes_through_a_correction():
    ratio = W.log().requires_grad_()
    for weight in (
        truncated_weight(ratio, 2.0),
        interval_weight(ratio, 0.5, 2.0),
        sequence_mask_weight(ratio, 0, 9),
    ):
        assert not weight.requires_grad


def test_micro_batches_add_up_only_with_a_count_of_the_whole_batch():
    loss = ppo()
    assert float(loss[:3].sum() / 8 + loss[3:].sum() / 8) == pytest.approx(0.040625)
    assert float((loss[:3].mean() + loss[3:].mean()) / 2) == pytest.approx(-0.150833, abs=1e-6)


# --- beside the teacher, through the output layer ----------------------------------------------------------------

TOKENS, K, VOCABULARY, WIDTH = 8, 4, 13, 6


def rows_and_head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    student = torch.log_softmax(hidden @ weight.T, -1)
    teacher = torch.log_softmax(torch.randn(TOKENS, VOCABULARY, generator=generator), -1)
    ids = student.topk(K).indices
    token = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    rest = teacher.exp().scatter(1, ids, 0.0).sum(1).log()
    return hidden, weight, TokenRows(
        ids, teacher.gather(1, ids), rest, torch.full((TOKENS,), -torch.inf), token,
        student.gather(1, token[:, None])[:, 0] - W.float().log(), torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1]),
        GRPO.float(), torch.tensor([0.125, 0.125, 0.125, 0, 0.125, 0.125, 0.125, 0.125]),
    )  # fmt: skip


def layer_of(weight):
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = torch.nn.Parameter(weight.clone())
    return OutputLayer(head)


def by_autograd(hidden, weight, rows, opd, rl):
    """The two losses written out over the whole vocabulary."""
    logp = torch.log_softmax(hidden @ weight.T, -1)
    own, tail = logp.gather(1, rows.topk_ids), logp.exp().scatter(1, rows.topk_ids, 0.0).sum(1).log()
    kl = (own.exp() * (own - rows.teacher_topk)).sum(1) + tail.exp() * (tail - rows.teacher_tail)
    sampled = logp.gather(1, rows.token_ids[:, None])[:, 0]
    policy = clip_loss(sampled, rows.sampled_logprobs, rows.advantages, 0.2, 0.28, 3.0).loss
    return opd * (rows.weights * kl).sum() + rl * (rows.policy_weights * policy).sum()


@pytest.mark.parametrize(("opd", "rl"), [(1.0, 1.0), (0.3, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("chunk", [3, 8])
def test_both_losses_have_the_gradients_of_autograd(opd, rl, chunk):
    hidden, weight, rows = rows_and_head()
    term = PolicyAndDistillation(
        Distillation((), "merged"), lambda p, q, a, _: clip_loss(p, q, a, 0.2, 0.28, 3.0), None, opd, rl
    )
    layer = layer_of(weight)
    found = [hidden.clone().requires_grad_(), layer.weight]
    result = head_loss(found[0], layer, rows, term, chunk)
    result.loss.backward()
    expected = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss = by_autograd(*expected, rows, opd, rl)
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    sums = dict(zip(term.sum_names, result.sums.tolist(), strict=True))
    assert sums["policy_tokens"] == 7 and sums["tokens"] == 6, "each loss has its own mask"
    assert sums["ratio"] == pytest.approx(float(W.sum() - W[3]), rel=1e-4)


@pytest.mark.parametrize("chunk", [3, 8])
def test_without_autograd_the_head_has_the_same_value_to_the_bit(chunk):
    hidden, weight, rows = rows_and_head()
    term, layer = PolicyAndDistillation(Distillation((1,), "merged"), clip_of, None, 1.0, 1.0), layer_of(weight)
    found = head_loss(hidden, layer, rows, term, chunk)
    with torch.no_grad():
        alone = head_loss(hidden, layer, rows, term, chunk)
    assert (alone.sums[-5:] == 0).all() and (found.sums[-5:] != 0).all(), "there is no gradient to be seen"
    found = found._replace(sums=torch.cat([found.sums[:-5], torch.zeros(5)]))
    for own, other in zip(alone, found, strict=True):
        assert not own.requires_grad and torch.equal(own, other.detach())


def test_the_pull_of_two_equal_tokens_by_hand():
    """p = (1/2, 1/2): -log p of one asks for (-1/2, 1/2) in the logits; log 2 of KL a quarter of it either way."""
    half = torch.full((1, 2), 0.5).log()
    student = StudentLogprobs(half[:, :1], half[:, 1], torch.full((1,), -torch.inf), half[:, 0])
    slopes = StudentLogprobs(torch.tensor([[0.25]]), torch.tensor([-0.25]), torch.zeros(1), torch.tensor([-1.0]))
    policy, kl = gradient_pulls(student, slopes)
    assert policy.tolist() == pytest.approx([1.0]) and kl.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("eos", ["raw", "merged", "mask"])
@pytest.mark.parametrize("chunk", [3, 8])
def test_pulls_are_norms_of_the_two_gradients_in_all_logits(chunk, eos):
    """Of each loss alone, by the same head; its own gradient is that of autograd (above)."""
    hidden, weight, rows = rows_and_head()
    assert 0 < (rows.topk_ids == rows.token_ids[:, None]).any(1).sum() < TOKENS, "some lie outside the top k"
    stops, logits = (1, 5), hidden @ weight.T
    rows = rows._replace(teacher_stop=rows.teacher_tail - 1.0)

    def gradient_of(opd, rl):
        term = PolicyAndDistillation(Distillation(stops, eos), clip_of, None, opd, rl)
        gradient = logits.clone()
        loss_and_gradient(gradient, rows, term)
        return gradient.double()

    policy, kl = gradient_of(0.0, 2.0), gradient_of(0.3, 0.0)
    term = PolicyAndDistillation(Distillation(stops, eos), clip_of, None, 0.3, 2.0)
    found = head_loss(hidden.requires_grad_(), layer_of(weight), rows, term, chunk)
    sums = dict(zip(term.sum_names, found.sums.tolist(), strict=True))
    assert sums["policy_pull"] == pytest.approx(policy.abs().sum().item(), rel=1e-5)
    assert sums["kl_pull"] == pytest.approx(kl.abs().sum().item(), rel=1e-5)
    policy, kl = (of_events(gradient, rows.topk_ids, stops) for gradient in (policy, kl))
    assert sums["gradient_product"] == pytest.approx((policy * kl).sum().item(), rel=1e-4)
    assert sums["policy_gradient_squared"] == pytest.approx((policy**2).sum().item(), rel=1e-5)
    assert sums["kl_gradient_squared"] == pytest.approx((kl**2).sum().item(), rel=1e-5)


@pytest.mark.parametrize("k", [K, 0])
def test_entropy_and_ratios_are_those_of_the_policys_tokens(k):
    hidden, weight, rows = rows_and_head()
    logp = torch.log_softmax(hidden @ weight.T, -1)
    expected = -logp.gather(1, rows.token_ids[:, None])[:, 0]
    if k:
        top = logp.exp().gather(1, rows.topk_ids)
        events = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
        expected = -(events * events.log()).sum(1)
    rows = rows._replace(
        topk_ids=rows.topk_ids[:, :k], teacher_topk=rows.teacher_topk[:, :k],
        sampled_logprobs=rows.sampled_logprobs - torch.eye(TOKENS)[3] * 9,  # of the token that counts nothing
    )  # fmt: skip
    term = PolicyAndDistillation(Distillation((1,), "merged"), clip_of, None, 1.0, 1.0)
    found = head_loss(hidden, layer_of(weight), rows, term, 3)
    sums, maxima = (
        dict(zip(names, values.tolist(), strict=True))
        for names, values in ((term.sum_names, found.sums), (term.max_names, found.maxima))
    )
    counts = rows.policy_weights > 0
    assert sums["policy_entropy"] == pytest.approx(expected[counts].sum().item(), rel=1e-4)
    assert maxima["ratio"] == pytest.approx(3.0, rel=1e-4)
    assert maxima["log_ratio"] == pytest.approx(W.log()[counts].abs().max().item(), rel=1e-4)


def test_a_pass_without_credit_has_no_policy():
    hidden, weight, rows = rows_and_head()
    term = PolicyAndDistillation(Distillation((), "merged"), clip_of, None, 1.0, 1.0)
    layer = layer_of(weight)
    plain = head_loss(hidden, layer, rows._replace(advantages=None, policy_weights=None), term, 8)
    own = head_loss(hidden, layer, rows, term.distillation, 8)
    assert float(plain.loss) == float(own.loss)
    sums = dict(zip(term.sum_names, plain.sums.tolist(), strict=True))
    assert sums["kl_loss"] == float(own.loss) and sums["policy_tokens"] == 0, "its KL counts as everywhere"


def clip_of(logp, anchor, advantage, _):
    return clip_loss(logp, anchor, advantage, 0.2, 0.28, None)
