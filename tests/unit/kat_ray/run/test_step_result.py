"""One step's result: what its stages did, and what metrics are made of it."""

from dataclasses import replace

import numpy as np
import pytest

from kat_ray.observability.metric_catalog import check_names
from kat_ray.run.step_result import LearnerReport, StepResult, StepTimes
from kat_ray.types.records import SampledRollout, SamplerReport
from tests.unit.kat_ray.termination.test_termination import chunk

REPORT = LearnerReport(
    policy_version=3, loss=0.5, grad_norm=1.0, lr=1e-3, tokens=30, dropped_tokens=0, logprob_diff_mean=0.0,
    logprob_diff_max=0.0, entropy=0.2, tail_mass=0.0, stop_mass=0.01, micro_batches=1, seconds=4.0, skipped=False,
)  # fmt: skip
CLOCK = {"step": 10.0, "sample": 6.0, "learn": 4.5, "publish": 0.5}


def a_report(number, wait, tokens, decisions=()):
    rollout = SampledRollout(number, np.zeros(tokens, np.int32))
    return SamplerReport((rollout,), (), 5.0, wait, 0.25, np.array(decisions))


def a_step(**changes):
    reports = [a_report(0, 1.0, 20, [0.1, 0.3]), a_report(1, 2.0, 30, [0.5])]
    scored = [
        replace(chunk([0], [0], [[1.0]]), scorer=name, seconds=s)
        for name, s in (("a", 1.0), ("a", 1.5), ("b", 0.5))
    ]
    result = StepResult(4, REPORT, StepTimes.of(reports, scored, 0.25, **CLOCK), staleness=1, restarts=2)
    return replace(result, **changes)


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


def test_a_step_without_chunks_says_nothing_of_decisions():
    times = StepTimes.of([a_report(0, 0.0, 0)], [], 0.0, **CLOCK)
    assert times.decisions is None and "time/decision_mean" not in times.to_metrics()
    assert (times.scorer.busy, times.scorer.tokens_per_second) == (0.0, 0.0)
