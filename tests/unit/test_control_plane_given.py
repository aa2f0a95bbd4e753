"""Runs on a fake cluster that learn from completions of the data beside rollouts."""

import json

import pytest

from kat_ray.data.prompt_order import given_places
from tests.support.scenarios import ALONE, GIVEN, LAYOUTS, TWO_TEACHERS, Run, finish

BESIDE = LAYOUTS[GIVEN]


def changed(layout, **off_policy):
    changes = dict(LAYOUTS[layout])
    objective = {**changes.get("objective", {}), "off_policy": {"share": 0.4, **off_policy}}
    return {**changes, "objective": objective, "data": {**changes.get("data", {}), "completion_column": "solution"}}


@pytest.mark.parametrize("loss", ["sft", "distillation"])
def test_what_is_given_is_counted_apart(loss):
    run = Run(0, changed(GIVEN, loss=loss))
    result = finish(run)
    summary, metrics = result.run.summary, [m for _, m in result.run.metrics]
    places = [given_places(run.config, step) for step in range(3)]
    assert [m["offpolicy/completions"] for m in metrics] == [len(p) for p in places] and all(places)
    rollouts = 2 * (12 - sum(map(len, places)))
    assert summary["rollouts_started"] == rollouts == sum(map(len, result.run.traces.values()))
    assert summary["scored_tokens"] == sum(len(row.d) for rows in result.run.traces.values() for row in rows)
    assert summary["given_tokens"] > 0
    asked = summary["given_tokens"] + summary["given_prompt_tokens"] if loss == "distillation" else 0
    assert summary["given_scored_tokens"] == asked
    for metric, rows in zip(metrics, result.run.traces.values(), strict=True):
        own = metric["scorer/row_bytes_per_token"] * sum(len(row.d) for row in rows)
        assert (metric["transfer/row_bytes"] > own + 1) == (loss == "distillation")


def test_the_calibration_is_that_of_the_rollouts_alone():
    """Another loss of the same completions: the learner's weights differ, and rollouts of fixed engines do not."""
    states = []
    for loss in ("sft", "distillation"):
        changes = changed("sampled ahead", loss=loss)
        result = finish(Run(0, changes))
        states.append({s: json.loads(state)["rule"] for s, (state, _) in result.checkpoints.written.items()})
        rows = [row for rows in result.run.traces.values() for row in rows]
        taken = {p for step in range(3) for p in given_places(Run(0, changes).config, step)}
        assert taken and all(row.d.size for row in rows)
    assert states[0] == states[1]


@pytest.mark.parametrize("layout", ["rewards", ALONE, TWO_TEACHERS, "imputed cuts", "sampled ahead"])
def test_it_goes_with_whatever_else_a_run_does(layout):
    loss = "sft" if layout == ALONE else "distillation"
    result = finish(Run(0, changed(layout, loss=loss)))
    rows = [row for rows in result.run.traces.values() for row in rows]
    assert result.run.summary["given_tokens"] > 0 and len(rows) == result.run.summary["rollouts_started"]
    if layout == TWO_TEACHERS:
        counts = result.run.summary
        told = sum(counts["teacher_tokens"].values())
        assert told == counts["prompt_tokens"] + counts["scored_tokens"] + counts["given_scored_tokens"]


def test_after_its_steps_all_is_generated():
    result = finish(Run(0, changed(GIVEN, steps=1)))
    assert ["offpolicy/completions" in m for _, m in result.run.metrics] == [True, False, False]
    assert len(result.run.traces[2]) == 8


@pytest.mark.parametrize("victim", ["scorer:0", "scorer:1", "learner:1", "sampler:0"])
@pytest.mark.parametrize("nth", [1, 2])
def test_whoever_dies_while_completions_are_scored_changes_nothing(victim, nth):
    run = Run(0, BESIDE)
    run.cluster.when("scorer", "score_given", lambda: run.cluster.kill(victim), nth=nth)
    finish(run, f"kill:{victim}")
