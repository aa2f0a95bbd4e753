"""Evaluations along a run on a fake cluster: what they record, and that they move nothing of training."""

from itertools import accumulate

import pytest

from tests.support.scenarios import PLAIN, Run, check, compare, undisturbed

EVALUATED = {
    "run": {**PLAIN["run"], "steps": 6},
    "evaluation": {"data": {"path": "unused.jsonl"}, "k": 3, "every": 1, "every_k": 1, "teacher": False},
}
WITHOUT = {"run": EVALUATED["run"]}


@pytest.fixture(scope="module")
def plain():
    return Run(0, EVALUATED).go()


def test_an_evaluation_has_what_training_cost_until_then(plain):
    records = dict(plain.run.evaluations)
    assert plain.error is None and list(records) == list(range(7)) and len(plain.run.evaluations) == 7
    assert [record["k"] for record in records.values()] == [3, 1, 1, 1, 1, 1, 3]
    assert all(len(r["right"]) == 6 and max(r["right"]) <= r["k"] for r in records.values())
    assert 0 < sum(r["avg_at_k"] for r in records.values()) < 7
    for name in ("generated", "kept", "overshoot"):
        steps = [metrics[f"rollout/{name}_tokens"] for _, metrics in plain.run.metrics]
        assert [r[f"{name}_tokens"] for r in records.values()] == [0, *accumulate(steps)]
    for name in ("prompt", "generated", "kept", "scored", "trained"):
        spent = [record[f"{name}_tokens"] for record in records.values()]
        assert spent == sorted(set(spent)) and spent[0] == 0 and spent[-1] == plain.run.summary[f"{name}_tokens"]


def test_an_evaluation_moves_nothing_of_training(plain):
    check(plain)
    compare(plain, undisturbed(WITHOUT))


@pytest.mark.parametrize(("method", "nth"), [("learn", 2), ("learn", 4), ("weights", 6)])
def test_a_run_that_goes_back_has_each_evaluation_once(plain, method, nth):
    run = Run(0, EVALUATED)
    run.cluster.when("learner:0", method, lambda: run.cluster.kill("learner:0"), nth=nth)
    result = run.go()
    check(result)
    assert any("kill:learner:0" in line for line in result.cluster.log)
    compare(result, undisturbed(WITHOUT))
    told = {step: record["right"] for step, record in result.run.evaluations}
    assert [step for step, _ in result.run.evaluations] == list(range(7))
    assert told == {step: record["right"] for step, record in plain.run.evaluations}


def test_a_run_that_is_resumed_has_each_evaluation_once(plain):
    run = Run(0, EVALUATED)
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=4)
    result = run.go()
    assert not result.finished and 0 < len(result.run.evaluations) < 7
    again = Run(0, EVALUATED, start_from=result).go()
    check(again)
    assert again.error is None
    assert [step for step, _ in again.run.evaluations] == list(range(7))
    assert [r["right"] for _, r in again.run.evaluations] == [r["right"] for _, r in plain.run.evaluations]


def test_further_sets_are_recorded_beside_the_first_and_change_nothing_of_it(plain):
    own = EVALUATED["evaluation"]
    sets = {"more": {"data": {"path": "unused.jsonl"}, "k": 2}}
    result = Run(0, EVALUATED | {"evaluation": {**own, "sets": sets, "greedy": True}}).go()
    check(result)
    told = [record for _, record in result.run.evaluations]
    assert [r["right"] for r in told] == [r["right"] for _, r in plain.run.evaluations]
    assert [{n: s["k"] for n, s in r["sets"].items()} for r in told] == [
        {"greedy": 1, "more": k, "more/greedy": 1} for k in (2, 1, 1, 1, 1, 1, 2)
    ]
    assert all("sets" not in record for _, record in plain.run.evaluations)
    again = EVALUATED | {"evaluation": {**own, "sets": sets}}
    run = Run(0, again)
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=4)
    first = run.go()
    resumed = Run(0, again, start_from=first).go()
    assert resumed.error is None and [step for step, _ in resumed.run.evaluations] == list(range(7))
