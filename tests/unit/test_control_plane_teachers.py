"""Runs with several teachers on the fake cluster: groups of scorers that die, freeze, grow and shrink.

Each model's KL is its own there (`tests.support.quick_engines`): a rollout that another group scored would differ.
"""

from unittest import mock

import numpy as np
import pytest

from actors.testing.stub_teacher import stub_kl
from kat_ray.cluster.scaling_policy import Change, ScalingPolicy
from tests.support.quick_engines import SCALES
from tests.support.scenarios import AVERAGE, LAYOUTS, LIVE, TWO_TEACHERS, Run, check_schedule, finish

TEACHERS = LAYOUTS[TWO_TEACHERS]


def test_a_rollout_is_scored_by_its_teachers_group():
    run = Run(0, TEACHERS)
    result = finish(run)
    assert {*result.roles} >= {"scorer", "scorer-math", "scorer-prose"} and "scorer-code" not in result.roles
    rows = [row for rows in result.run.traces.values() for row in rows]
    assert {row.teacher for row in rows} == {"default", "math", "code", "prose"}
    metrics = {name: value for _, step in result.run.metrics for name, value in step.items()}
    assert metrics["pools/scorer_replicas/math"] == 2 and metrics["pools/scorer_replicas/prose"] == 1
    for row in rows:
        model = run.config.all_teachers[row.teacher].path
        expected = stub_kl(np.full(len(row.d), row.rollout_id), np.arange(len(row.d)), 16) * SCALES.get(model, 1.0)
        np.testing.assert_array_equal(row.d, expected.astype(np.float32))
    assert "kat/threshold" not in metrics and "teacher/threshold/math" in metrics
    summary = result.run.summary
    assert [*summary["teacher_tokens"]] == ["teacher", "teachers.math", "teachers.prose"]
    scored = sum(summary["teacher_tokens"].values()) - summary["prompt_tokens"]
    assert 0 < scored <= summary["scored_tokens"]


@pytest.mark.parametrize("victim", ["scorer-math:1", "scorer-prose:0", "scorer:0"])
@pytest.mark.parametrize("how", ["kill", "lose", "freeze"])
def test_a_group_loses_a_scorer(victim, how):
    """The only one of its group comes back with its rollouts; another's are taken over by one of the same group."""
    run = Run(1, TEACHERS)
    run.cluster.when(victim, "score", lambda: getattr(run.cluster, how)(victim), nth=3)
    finish(run, f"{how}:{victim}")


def test_all_scorers_of_two_groups_die_at_once():
    run = Run(2, TEACHERS)
    victims = ("scorer-math:0", "scorer-math:1", "scorer-prose:0")
    run.cluster.when("scorer-math:0", "score", lambda: [run.cluster.kill(v) for v in victims], nth=3)
    finish(run, *(f"kill:{v}" for v in victims))


def test_a_monitor_that_dies_gets_the_teachers_of_its_rollouts_back():
    run = Run(3, TEACHERS)
    run.cluster.when("monitor:1", "observe", lambda: run.cluster.kill("monitor:1"), nth=4)
    run.cluster.when("monitor:0", "close_step", lambda: run.cluster.kill("monitor:0"), nth=2)
    finish(run, "kill:monitor:1", "kill:monitor:0")


def test_a_run_that_is_told_to_end_goes_on_with_every_calibration():
    for switch in (300, 600, 900):
        check_schedule(4, [(switch, "kill", "scorer-prose:0"), (switch + 60, "terminate", "driver")], TWO_TEACHERS)


def test_a_group_grows_and_another_does_without_a_replica():
    """The new one is a scorer of its group, and gets that group's rollouts only."""
    elastic = {
        **TEACHERS,
        "teachers": {
            "math": {"path": "other", "scorer": {"replicas": 2, "min_replicas": 1}},
            "code": {"path": "third", "scorer": {"replicas": 1, "max_replicas": 2}},
        },
        "run": {"steps": 6, "checkpoint_every": 1},
        "cluster": LAYOUTS["elastic"]["cluster"],
    }
    run = Run(0, elastic)
    run.cluster.when("scorer-math", "score", lambda: run.cluster.evict("scorer-math:1"), nth=3)
    asked = []

    def observe(_, times, sizes):
        asked.append((set(times.busy), sizes))
        return Change("scorer-code", 1, "it is asked for") if len(asked) == 1 else None

    with mock.patch.object(ScalingPolicy, "observe", observe):
        result = finish(run, "lose:scorer-math:1")
    roles = {"sampler", "scorer", "scorer-math", "scorer-code"}
    assert asked[0][0] == {*asked[0][1]} == roles, "each pool is judged by its own scorers"
    last = result.run.metrics[-1][1]
    assert last["pools/scorer_replicas/math"] == 1 and last["pools/scorer_replicas/code"] == 2
    assert {a.name for a in result.cluster.actors if a.name.startswith("scorer-code")} == {
        "scorer-code:0", "scorer-code:1"
    }  # fmt: skip


LIVE_RUN = LAYOUTS[LIVE]


@pytest.mark.parametrize("scorers", [1, 2])
@pytest.mark.parametrize("nth", [2, 9, 17])
def test_a_scorer_that_comes_back_is_given_the_students_weights(scorers, nth):
    """A token's KL is of the weights there: one that was scored by others, or by those as given, would differ."""
    run = Run(5, {**LIVE_RUN, "scorer": {"replicas": scorers}})
    run.cluster.when("scorer", "score", lambda: run.cluster.kill("scorer:0"), nth=nth)
    result = finish(run, "kill:scorer:0")
    of_steps = [{float(row.d.max()) for row in rows} for rows in result.run.traces.values()]
    assert len(of_steps) == 3 and of_steps[0] != of_steps[1] != of_steps[2]


@pytest.mark.parametrize("method", ["follow", "load_weights"])
def test_a_death_while_the_student_is_published_to_its_own_scorers(method):
    for nth in (1, 2, 3, 4):
        run, role = Run(nth, LIVE_RUN), "scorer:1" if method == "follow" else "sampler:0"
        run.cluster.when(role, method, lambda run=run, role=role: run.cluster.kill(role), nth=min(nth, 3))
        finish(run, f"kill:{role}")


def test_the_students_weights_are_lost_with_the_learner_that_made_them():
    run = Run(6, LIVE_RUN)
    run.cluster.when("scorer:0", "follow", lambda: run.cluster.lose("learner:0"), nth=3, at="send")
    finish(run, "lose:learner:0")


def test_a_run_whose_student_teaches_goes_on_from_its_checkpoint():
    for switch in (400, 700):
        check_schedule(7, [(switch, "terminate", "driver")], LIVE)


def test_a_new_scorer_of_a_pool_that_grows_holds_the_newest_weights():
    changes = {**LIVE_RUN, "scorer": {"replicas": 1, "max_replicas": 2}, "run": {"steps": 6, "checkpoint_every": 1}}
    asked = []

    def observe(*_):
        asked.append(1)
        return Change("scorer", 1, "it is asked for") if len(asked) == 1 else None

    with mock.patch.object(ScalingPolicy, "observe", observe):
        result = finish(Run(0, changes))
    assert result.run.metrics[-1][1]["pools/scorer_replicas"] == 2


def test_a_teacher_that_is_the_students_average_is_resumed_with_it():
    """Its scorers hold the average of all steps so far, whoever dies; a run that goes on has it back."""
    for role in ("scorer:0", "learner:1", "sampler:0"):
        run = Run(8, LAYOUTS[AVERAGE])
        run.cluster.when("scorer", "score", lambda role=role, run=run: run.cluster.kill(role), nth=14)
        finish(run, f"kill:{role}")
    check_schedule(9, [(600, "terminate", "driver")], AVERAGE)
