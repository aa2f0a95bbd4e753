"""Results of steps by hand."""

from dataclasses import replace

import numpy as np

from kat_ray.run.step_result import LearnerReport, StepResult, StepTimes
from kat_ray.types.records import SampledRollout, SamplerReport
from tests.support.chunks import chunk

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
    result = StepResult(4, REPORT, StepTimes.of([reports], scored, 0.25, **CLOCK), staleness=1, restarts=2)
    return replace(result, **changes)
