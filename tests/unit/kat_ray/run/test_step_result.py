"""One step's result: what its stages did, and what metrics are made of it."""

from dataclasses import replace

import pytest

from actors.learner.report import OptimizerStep, policy_report
from kat_ray.losses.policy import PolicyAndDistillation
from kat_ray.losses.statistics import StudentStatistics
from kat_ray.observability.metric_catalog import check_names
from kat_ray.run.step_result import StepTimes
from tests.support.step_results import CLOCK, REPORT, a_report, a_step


def test_the_stages_by_hand():
    times = a_step().times
    assert (times.sampler.busy, times.sampler.tokens) == (3.5, 50) and times.scorer.busy == 1.5
    assert (times.sampling, times.score_wait, times.control) == (5.0, 2.0, 0.25)
    assert times.sampler.tokens_per_second == pytest.approx(50 / 7), "3 and 4 of their 5 seconds they were busy"
    assert times.scorer.tokens_per_second == 1.0
    assert times.decisions == (pytest.approx(0.3), 0.5)


def test_the_busiest_stage_tells_what_a_step_failed_to_overlap():
    assert a_step().idle_share == pytest.approx(0.6), "the learner was busy for 4 of 10 seconds"
    assert a_step(learner=replace(REPORT, seconds=11.0)).idle_share == 0.0


def test_metrics_are_those_of_the_catalogue():
    recorded = {"kl/mean": 0.5, "rollout/max_tokens_share": 0.25, "policy_version": 2.0}
    result = a_step(recorded=recorded, store={"store/used_share": 0.5})
    metrics = result.to_metrics()
    check_names(metrics)
    assert metrics.items() >= (recorded | {"store/used_share": 0.5}).items()
    assert (metrics["rollout/staleness"], metrics["pool/restarts"]) == (1.0, 2.0)
    assert metrics["throughput/tokens_per_second"] == 5.0 and metrics["throughput/learner"] == 7.5
    assert metrics["time/decision_max"] == 0.5 and metrics["learner/skipped"] == 0.0
    assert "learner/policy_version" not in metrics
    assert (result.kl_mean, result.max_tokens_share, result.budget) == (0.5, 0.25, None)


def test_weights_of_the_losses_are_metrics_where_they_change():
    metrics = a_step(learner=replace(REPORT, weights={"opd": 0.7, "rl": 1.0})).to_metrics()
    check_names(metrics)
    assert (metrics["objective/opd_weight"], metrics["objective/rl_weight"]) == (0.7, 1.0)
    assert not any(name.startswith("objective/") for name in a_step().to_metrics())


def test_a_step_that_nobody_scored_says_nothing_of_scores_and_decisions():
    times = StepTimes.of([[a_report(0, 0.0, 20)]], [], 0.0, **CLOCK)
    assert times.decisions is None and times.scorer is None
    absent = {"time/decision_mean", "time/score_wait", "time/scorer_busy", "time/monitor", "throughput/scorer"}
    assert (
        not absent & times.to_metrics().keys()
        and absent - {"time/decision_mean"} <= a_step().times.to_metrics().keys()
    )
    assert a_step(times=times).idle_share == 0.5, "the sampler was busy for 5 of 10 seconds"


def test_a_policy_without_a_token_has_no_ratio():
    """Neither means of nothing nor a report: a ratio of 0 would be drawn as two models that differ."""
    sums = dict.fromkeys(
        ("policy_tokens", "policy_loss", "ratio", "ratio_squared", "clipped_low", "clipped_high"), 0.0
    )
    sums |= {"masked": 0.0, "policy_entropy": 0.0, "policy_pull": 0.0, "kl_pull": 0.0}
    sums |= dict.fromkeys(("gradient_product", "policy_gradient_squared", "kl_gradient_squared"), 0.0)
    step = OptimizerStep(0.0, sums, {"ratio": 0.0, "log_ratio": 0.0}, 0.0, 1e-3, 1)
    alone = policy_report(step)
    metrics = replace(REPORT, policy=alone).to_metrics()
    assert {name for name in metrics if name.startswith("rl/")} == {"rl/loss", "rl/tokens"}
    assert policy_report(replace(step, sums=sums | {"kl": 1.0})) is None
    assert policy_report(replace(step, sums=sums | {"kl": 1.0, "policy_tokens": 2.0})) is not None


@pytest.mark.parametrize(("policy", "kl", "share"), [(3.0, 1.0, 0.75), (0.0, 1.0, 0.0), (2.0, 0.0, None)])
def test_the_share_of_a_gradient_needs_two_losses(policy, kl, share):
    sums = dict.fromkeys(PolicyAndDistillation(StudentStatistics(()), None, None, 1.0, 1.0).sum_names, 1.0)
    step = OptimizerStep(
        0.0, sums | {"policy_pull": policy, "kl_pull": kl}, {"ratio": 1.0, "log_ratio": 0.0}, 0.0, 1e-3, 1
    )
    found = policy_report(step)
    assert found.grad_share == share
    assert replace(REPORT, policy=found).to_metrics().get("rl/grad_share") == share


@pytest.mark.parametrize(("product", "squares", "cosine"), [(-3.0, (4.0, 9.0), -0.5), (0.0, (4.0, 0.0), None)])
def test_the_cosine_of_two_gradients_needs_both(product, squares, cosine):
    sums = dict.fromkeys(PolicyAndDistillation(StudentStatistics(()), None, None, 1.0, 1.0).sum_names, 1.0)
    sums |= dict(zip(("policy_gradient_squared", "kl_gradient_squared"), squares, strict=True))
    step = OptimizerStep(0.0, sums | {"gradient_product": product}, {"ratio": 1.0, "log_ratio": 0.0}, 0.0, 1e-3, 1)
    found = policy_report(step)
    assert found.grad_cosine == cosine
    assert replace(REPORT, policy=found).to_metrics().get("rl/grad_cosine") == cosine
