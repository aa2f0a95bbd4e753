"""From the sums of an optimiser step to its report."""

import pytest

from actors.learner.report import OptimizerStep, policy_report, report_of
from kat_ray.losses.distillation import Distillation
from kat_ray.losses.policy import PolicyAndDistillation

TERM = PolicyAndDistillation(Distillation((1,), "merged"), lambda *_: None, None, 0.0, 1.0)


def test_tokens_are_those_of_the_loss():
    """Without a weight for the KL it is measured, and its tokens are not learnt from."""
    sums = dict.fromkeys(TERM.sum_names, 1.0) | {
        "tokens": 12.0,
        "weight": 12.0,
        "kl_loss": 6.0,
        "policy_tokens": 9.0,
    }
    step = OptimizerStep(0.5, sums, dict.fromkeys(TERM.max_names, 0.0), 1.0, 1e-3, 2, weight=12.0)
    both, rewards = (report_of(step, 3, 1.0, distils=distils) for distils in (True, False))
    assert (both.tokens, rewards.tokens) == (12, 9)
    assert both.policy.tokens == rewards.policy.tokens == 9
    assert rewards.loss == both.loss == 0.5, "the KL of all tokens that were measured"


def test_the_share_that_ratios_leave_is_that_of_the_example():
    ratios = (1, 3, 0.4, 1, 1.2, 0.9, 2.5, 1)
    sums = dict.fromkeys(TERM.sum_names, 0.0) | {
        "policy_tokens": 8.0, "ratio": sum(ratios), "ratio_squared": sum(r * r for r in ratios)
    }  # fmt: skip
    step = OptimizerStep(0.5, sums, dict.fromkeys(TERM.max_names, 0.0), 1.0, 1e-3, 1)
    assert policy_report(step).effective_share == pytest.approx(0.732091, abs=1e-6)
