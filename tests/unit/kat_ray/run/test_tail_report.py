"""The line about what the KL does not see: after the first step, and when it has changed much."""

import json
import math
from dataclasses import replace

from kat_ray.run.tail_report import TailReport
from tests.support.step_results import REPORT, a_step


def step(tail, **more):
    figures = {"tail_mass": tail, "loss": 0.46, "kl_hidden": 0.2251, "top_k_for_99": 5_231} | more
    return a_step(learner=replace(REPORT, **figures))


def said(values):
    report = TailReport(64)
    return [report.observe(step(v)) is not None for v in values]


def test_the_line_by_hand():
    assert TailReport(64).observe(step(0.27)) == (
        "step 4: rollout.top_k_logprobs = 64 sees 73.0% of the student's mass; the rest, which is one event, hides "
        "an estimated 0.23 nats beside the 0.46 of learner/loss; 5,200 would see 99 %"
    )
    seen = TailReport(64).observe(step(0.001, kl_hidden=0.0))
    assert "sees 99.9% of" in seen and "would see" not in seen
    assert TailReport(64).observe(step(0.27, kl_hidden=None, top_k_for_99=None)).endswith("student's mass")


def test_it_is_said_once_and_again_when_it_has_changed_much():
    assert said([0.27, 0.26, 0.30, 0.39, 0.41, 0.42]) == [True, False, False, False, True, False]
    assert said([0.27, 0.19, 0.17, 0.10]) == [True, False, True, True]
    assert said([0.001, 0.01, 0.02, 0.022]) == [True, False, False, True], "shares of little are scatter"


def test_steps_that_learnt_nothing_say_nothing():
    report = TailReport(64)
    assert report.observe(step(0.0, tokens=0)) is None
    assert report.observe(step(0.5, skipped=True)) is None and report.observe(step(math.nan)) is None
    assert report.observe(step(0.3)) is not None


def test_a_resumed_run_does_not_say_it_again():
    report, other = TailReport(64), TailReport(64)
    report.observe(step(0.3))
    other.load_state(json.loads(json.dumps(report.state())))
    assert other.observe(step(0.3)) is None and other.observe(step(0.6)) is not None
