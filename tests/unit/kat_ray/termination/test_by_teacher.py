"""Rules of several teachers: each is as if it were alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.data.accounting import finished
from kat_ray.errors import UserError
from kat_ray.termination import RunFacts, make_rule
from kat_ray.termination.by_teacher import TeacherRules
from kat_ray.types.records import StepStart
from tests.support.chunks import chunk
from tests.support.rules import settings_from

FACTS = RunFacts(0, 40)
KAT = settings_from(rule="kat", window=3, consecutive=2, exempt=1, eta=0.4, min_samples=2, min_steps=1, buffer=16)
# Steps, each with rollouts: whose it is, whether a probe, and its d's.
ONE = st.tuples(
    st.sampled_from(("math", "code")), st.booleans(), st.lists(st.floats(0, 2, width=32), min_size=1, max_size=14)
)
ROLLOUTS = st.lists(st.lists(ONE, min_size=1, max_size=8), min_size=1, max_size=4)


def played(steps, teachers, rule=KAT):
    """The outcomes and calibrations of a monitor for these teachers, told of their rollouts only."""
    monitor, found, number = TrapMonitor(rule, FACTS, teachers), [], 0
    for step, rollouts in enumerate(steps):
        start = monitor.start_step(step)
        ids, own = [], []
        for rollout in rollouts:
            if rollout[0] in teachers:
                ids.append(number)
                own.append(rollout)
            number += 1
        monitor.admit(step, 1, ids, [probe for _, probe, _ in own], None, [name for name, _, _ in own])
        if ids:
            monitor.observe(_scored(ids, [d for _, _, d in own]))
        closed = monitor.close_step([1])
        state = monitor.learn(step, [finished(o) for o in closed.outcomes])
        found.append((start, closed.outcomes, state))
    return found


def _scored(ids, rows):
    made = chunk(ids, [0] * len(ids), rows, ended=[1] * len(ids))
    return type(made)(**{**made.__dict__, "attempt": 1})


@settings(max_examples=60, deadline=None)
@given(ROLLOUTS)
def test_a_teachers_rollouts_are_judged_as_if_there_were_no_other(steps):
    together = played(steps, ("math", "code"))
    for name in ("math", "code"):
        for (start, outcomes, state), (own_start, own, own_state) in zip(
            together, played(steps, (name,)), strict=True
        ):
            assert start.of(name) == own_start
            assert [o for o in outcomes if o.teacher == name] == list(own)
            assert state["teachers"][name] == own_state
    assert json.loads(json.dumps(together[-1][2])) == together[-1][2]


def test_two_scales_of_kl_have_two_thresholds():
    steps = [[("math", True, [4.0] * 6), ("code", True, [0.5] * 6)] * 3] * 3
    (first, _, _), *_, (last, outcomes, _) = played(steps, ("math", "code"))
    assert first.by_teacher == {"math": StepStart(None, None), "code": StepStart(None, None)}
    assert (last.of("math").threshold, last.of("code").threshold) == (4.0, 0.5)
    assert (last.threshold, last.budget) == (None, None), "of all there is none"
    assert {(o.teacher, o.threshold, o.minimum) for o in outcomes} == {("math", 4.0, 4.0), ("code", 0.5, 0.5)}


def test_one_teacher_has_the_state_and_the_limits_of_its_rule():
    rules, alone = TeacherRules(KAT, FACTS, ["math"]), make_rule(KAT, FACTS)
    assert rules.state() == alone.state() and rules.start_step(0) == StepStart(None, None)
    rules.load_state({"buffer": [1.0, 2.0], "threshold": None})
    assert rules.start_step(1).threshold == pytest.approx(np.quantile([1.0, 2.0], 0.6)) and rules.samples == 2


def test_a_calibration_goes_on_from_its_state_and_from_no_other_teachers():
    rules = TeacherRules(KAT, FACTS, ["math", "code"])
    state = {"teachers": {"math": {"buffer": [1.0, 1.0], "threshold": None},
                          "code": {"buffer": [3.0], "threshold": None}}}  # fmt: skip
    rules.load_state(state)
    assert (rules.state(), rules.samples) == (state, 3)
    start = rules.start_step(1)
    assert (start.of("math").threshold, start.of("code").threshold) == (1.0, None), "code has too few samples"
    with pytest.raises(UserError, match="is that of math, and the run's teachers are math, code: start a new run"):
        rules.load_state({"teachers": {"math": state["teachers"]["math"]}})
    with pytest.raises(UserError, match="is that of one teacher alone"):
        rules.load_state({"buffer": [], "threshold": None})
