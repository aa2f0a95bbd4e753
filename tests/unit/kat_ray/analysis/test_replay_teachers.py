"""A run with two teachers, replayed: each teacher's cuts come out again, under its own thresholds."""

from dataclasses import replace

import numpy as np
import pytest

from kat_ray.analysis.replay import Replayed, calibrate, load_table, traces_from
from kat_ray.analysis.replay_rules import calibrate_by_teacher, follow, reproduce, sweep
from kat_ray.cli.replay import _reproduction
from kat_ray.records.traces import TraceRow, write_traces
from kat_ray.termination import Finished, RunFacts
from kat_ray.termination.by_teacher import TeacherRules
from kat_ray.types.records import StopReason
from tests.support.rules import settings_from, traces_of
from tests.support.scenarios import LAYOUTS, TWO_TEACHERS, Run

FACTS = RunFacts(0, 16)


@pytest.fixture(scope="module")
def played():
    """A run on the fake cluster, with two names of one checkpoint and two other teachers; its configuration."""
    run = Run(0, LAYOUTS[TWO_TEACHERS] | {"run": {"steps": 6}})
    result = run.go()
    assert result.error is None and result.finished
    return run.config, result.run


@pytest.fixture(scope="module")
def traces(played, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "traces").mkdir()
    for step, rows in played[1].traces.items():
        write_traces(folder / "traces", step, rows)
    return traces_from(load_table(folder)[0], ("token_ids",))


def test_the_runs_own_rule_gives_the_cuts_of_each_teacher_again(played, traces):
    replayed = reproduce(traces, played[0].termination, FACTS)
    recorded = np.where(traces.probe, traces.would_cut, traces.cut)
    assert replayed.cut.tolist() == recorded.tolist()
    cuts = {name: int((traces.cut[rows] >= 0).sum()) for name, rows in traces.by_teacher()}
    assert sorted(cuts) == ["code", "default", "math", "prose"] and sum(n > 0 for n in cuts.values()) >= 2
    said = _reproduction(traces, replayed)
    assert said.endswith("(" + ", ".join(f"{name} {n}" for name, n in cuts.items()) + ")")


def test_the_thresholds_follow_from_each_teachers_own_rollouts(played, traces):
    """The calibration, built up again from what was recorded."""
    config, run = played
    rules = TeacherRules(config.termination, FACTS, sorted(config.used_teachers))
    scales = set()
    for step, rows in sorted(run.traces.items()):
        start = rules.start_step(step)
        assert {row.rollout_id: row.threshold for row in rows} == {
            row.rollout_id: start.of(row.teacher).threshold for row in rows
        }
        scales |= {row.threshold for row in rows if row.threshold is not None}
        rules.end_step([Finished(r.minimum, r.cut is not None, r.probe, len(r.d), teacher=r.teacher) for r in rows])
    assert len(scales) >= 3


def test_another_rule_is_tried_on_each_teacher_alone(traces):
    kat = settings_from(
        rule="kat", window=3, consecutive=2, exempt=1, min_samples=2, min_steps=1, eta=0.5, calibrate_on="all"
    )
    thresholds, replayed = calibrate_by_teacher(traces, kat, 0)
    for _, rows in traces.by_teacher():
        own, alone = calibrate(traces.take(rows), kat)
        np.testing.assert_array_equal(thresholds[rows], own)
        np.testing.assert_array_equal(replayed.cut[rows], alone.cut)
    (swept,) = sweep(traces, kat, {}, FACTS)
    together, _ = calibrate(replace(traces, teacher=None), kat)
    assert swept.rollouts > 0 and not np.array_equal(thresholds, together, equal_nan=True)


def test_a_rule_that_learns_lengths_learns_those_of_each_teacher():
    """`progressive` raises its budget by what filled it: two teachers' rollouts have two budgets."""
    rule = settings_from(rule="progressive")
    traces = traces_of([[1.0] * 8] * 4, steps=[0, 0, 1, 1])
    named = replace(traces, teacher=np.array(["a", "b", "a", "b"]))
    whole = follow(named, rule, FACTS)
    for _, rows in named.by_teacher():
        np.testing.assert_array_equal(whole.cut[rows], follow(named.take(rows), rule, FACTS).cut)


def test_parts_are_put_together_in_the_order_of_rollouts():
    one = Replayed(np.array([5]), np.array([7]), np.array([-1]), np.array([0.5]))
    two = Replayed(np.array([1, 2]), np.array([3, 4]), np.array([9, -1]), np.array([0.25, np.nan]))
    whole = Replayed.joined([(np.array([1]), one), (np.array([0, 2]), two)])
    assert (whole.cut.tolist(), whole.confirmed.tolist()) == ([1, 5, 2], [3, 7, 4])
    assert whole.recovered.tolist() == [9, -1, -1] and whole.minimum[:2].tolist() == [0.25, 0.5]


def test_traces_of_before_there_were_names_are_of_one_teacher(tmp_path):
    row = TraceRow(0, "p", 0, 0, np.arange(3, dtype=np.int32), np.ones(3, np.float32), StopReason.EOS,
                   None, None, None, False, None, None, None)  # fmt: skip
    (tmp_path / "traces").mkdir()
    write_traces(tmp_path / "traces", 0, [row])
    traces = traces_from(load_table(tmp_path)[0])
    assert traces.teacher is None and [name for name, _ in traces.by_teacher()] == [""]
    assert traces.take(np.array([0])).teacher is None
