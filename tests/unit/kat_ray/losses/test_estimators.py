"""Ways to learn from a teacher's signal on one token, by exact expectation over a vocabulary of three.

The student has the logits LOGITS, the teacher TEACHER; gradients are in the student's logits, of what is
minimised. Ours is the KL itself, with gradient, beside the policy's loss.
"""

import pytest
import torch

from kat_ray.losses.distillation import Distillation
from kat_ray.losses.fused_head import head_loss
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.losses.policy import PolicyAndDistillation, clip_loss, reinforce_loss
from kat_ray.losses.term import TokenRows

LOGITS, TEACHER = torch.tensor([0.2, -0.1, 0.4]), torch.tensor([0.5, 0.0, -0.3])
P, Q = torch.log_softmax(LOGITS.double(), 0), torch.log_softmax(TEACHER.double(), 0)
TRUE = (-0.156080, -0.065609, 0.221690)
DRAWS = [0, 2, 2, 1]


def reinforce(logp, _, advantage, __):
    return reinforce_loss(logp, advantage)


def clip(logp, anchor, advantage, _):
    return clip_loss(logp, anchor, advantage, 0.2, 0.28, 3.0)


def learnt(tokens, advantages, weights, opd=0.0, loss=reinforce):
    """Loss and gradient in the logits of a batch of tokens from this state, through the head."""
    n, head = len(tokens), torch.nn.Linear(3, 3, bias=False)
    head.weight = torch.nn.Parameter(torch.eye(3))
    hidden = LOGITS.repeat(n, 1).requires_grad_()
    none, token = torch.full((n,), -torch.inf), torch.tensor(tokens)
    rows = TokenRows(
        torch.arange(3).repeat(n, 1), Q.float().repeat(n, 1), none, none, token, P.float()[token],
        torch.full((n,), 1 / n), torch.as_tensor(advantages).float(), torch.as_tensor(weights).float(),
    )  # fmt: skip
    term = PolicyAndDistillation(Distillation((), "raw"), loss, None, opd, 1.0)
    result = head_loss(hidden, OutputLayer(head), rows, term, 2)
    result.loss.backward()
    return result.loss.item(), hidden.grad.sum(0).tolist()


def expected(advantages, opd=0.0):
    """The expectation over the three tokens."""
    return learnt([0, 1, 2], advantages, P.exp(), opd)[1]


def by_autograd(estimator):
    """The expected gradient of a loss of a sampled token, in log p and log q of it."""
    logits = LOGITS.double().requires_grad_()
    loss = (P.exp() * estimator(torch.log_softmax(logits, 0), Q)).sum()
    return torch.autograd.grad(loss, logits)[0].tolist()


def close(values):
    return pytest.approx(values, abs=2e-6)


def test_the_kl_with_gradient_is_the_gradient_of_the_kl():
    loss, gradient = learnt([0], [0.0], [1.0], opd=1.0)
    assert loss == pytest.approx(0.0970992, abs=1e-6) and gradient == close(TRUE)


def test_a_kl_that_depends_on_the_prefix_alone_teaches_nothing_as_an_advantage():
    kl = float((P.exp() * (P - Q)).sum())
    assert expected([-kl] * 3) == close([0, 0, 0])


def test_the_sampled_log_ratio_teaches_as_an_advantage_and_not_as_a_loss():
    assert expected(-(P - Q)) == close(TRUE)
    assert by_autograd(lambda p, q: p - q) == close([0, 0, 0])


def test_half_the_squared_log_ratio_teaches_as_a_loss():
    assert by_autograd(lambda p, q: 0.5 * (p - q) ** 2) == close(TRUE)


def test_the_third_estimator_has_the_gradient_of_the_forward_kl():
    k3 = (Q - P).exp() - 1 - (Q - P)
    assert by_autograd(lambda p, q: (q - p).exp() - 1 - (q - p)) == close([-0.148830, -0.044937, 0.193767])
    assert expected(-k3) == close([-0.007250, -0.020673, 0.027923]), (
        "and as an advantage it vanishes near the teacher"
    )


def test_rewards_alone_and_beside_the_teacher():
    assert expected([1.0, 0.0, 0.0]) == close([-0.223621, 0.084426, 0.139195])
    assert expected([1.0, 0.0, 0.0], opd=0.1) == close([-0.239229, 0.077865, 0.161364])


def test_a_batch_of_four_draws():
    loss, gradient = learnt(DRAWS, [0.75, -0.25, -0.25, -0.25], [0.25] * 4, opd=0.1, loss=clip)
    assert loss == pytest.approx(0.00970992, abs=1e-6) and gradient == close([-0.203108, 0.055939, 0.147169])
