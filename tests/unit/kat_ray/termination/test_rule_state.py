"""What a rule saves of itself is all that it needs: one that is given it acts as the one that was not stopped."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.errors import UserError
from kat_ray.termination import (
    RULES,
    Finished,
    NewTokens,
    RolloutStart,
    RuleType,
    RunFacts,
    make_rule,
    make_table,
    registry,
)
from kat_ray.termination.settings import CuttingSettings
from tests.support.rules import recorded_run, settings_from

# Settings under which the rule does in a few steps of short rollouts what it is there for.
FIELDS = {
    "none": {},
    "kat": {
        "window": 4, "exempt": 2, "consecutive": 2, "buffer": 20, "min_samples": 8, "min_steps": 1, "budget": None,
    },
    "kat with a budget": {
        "window": 4, "exempt": 2, "consecutive": 2, "buffer": 20, "min_samples": 8, "min_steps": 1, "budget": 0.5,
    },
    "kat_stages": {"window": 4, "exempt": 2, "consecutive": 2, "buffer": 20, "min_samples": 8, "min_steps": 1},
    "fixed_prefix": {"n": 9},
    "random": {"longest": 12},
    "length_matched": {},
    "repetition": {"max_period": 3, "repeats": 3},
    "prune_opd": {"decay": 0.1, "start": 15, "growth": 3, "patience": 2, "shortest": 5},
    "progressive": {"start": 4, "steps": 5},
}  # fmt: skip
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    lengths = [[(20, 8 if i % 3 else None, i % 3 == 0) for i in range(12)]] * 4
    return recorded_run(tmp_path_factory.mktemp("recorded") / "run", lengths)


def make(name, record, **changes):
    rule = name.partition(" ")[0]
    fields = FIELDS[name] | ({"run": record} if name == "length_matched" else {}) | changes
    return make_rule(settings_from(rule=rule, **fields), RunFacts(5, MAX_TOKENS))


def play(rule, steps):
    """Everything that a rule lets be seen of these steps of 8 random rollouts."""
    seen = []
    for step in steps:
        rng = np.random.default_rng(step)
        rule.start_step(step)
        starts = [RolloutStart(8 * step + i, probe=i % 4 == 0) for i in range(8)]
        table = make_table(rule, starts)
        finished = []
        for row, start in enumerate(starts):
            n = MAX_TOKENS if start.probe or rule.budget is None else min(MAX_TOKENS, rule.budget)
            n = n if row % 2 else min(n, 12)
            d = rng.exponential(1.0, n)
            shares = rng.choice(np.array([0.5, 1.0], dtype=np.float32), n)
            tokens = NewTokens(d, rng.integers(0, 2, n).astype(np.int32), shares)
            one = np.array([row])
            table.observe(one, tokens, np.zeros(1, np.int64), np.array([n]))
            end = table.tracker_state(row)
            is_cut, full = end.cut is not None, n == rule.budget
            finished.append(Finished(end.minimum, is_cut, start.probe, n, full, end.evidence))
            seen.append((end.threshold, end.cut, end.minimum, end.weights and list(end.weights)))
        rule.end_step(finished)
        seen.append((rule.threshold, rule.budget, rule.samples, getattr(rule, "probe_share", None)))
    return seen


def test_every_rule_is_played():
    assert set(RULES) == {name.partition(" ")[0] for name in FIELDS}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_rule_that_is_given_its_state_goes_on_as_if_nothing_had_been(name, record):
    for stop in (0, 1, 4, 9):
        rule = make(name, record)
        play(rule, range(stop))
        text = json.dumps(rule.state())
        again = make(name, record)
        again.load_state(json.loads(text))
        assert json.dumps(again.state()) == text
        assert play(again, range(stop, 12)) == play(rule, range(stop, 12))


@pytest.mark.parametrize("name", ["kat", "kat with a budget", "kat_stages", "prune_opd"])
def test_rules_that_learn_would_go_on_otherwise_without_it(name, record):
    rule = make(name, record)
    play(rule, range(6))
    assert play(make(name, record), range(6, 12)) != play(rule, range(6, 12))


@given(st.lists(st.floats(-1e300, 1e300), max_size=40), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_minima_come_back_in_order_and_to_the_bit(minima, capacity):
    fields = FIELDS["kat"] | {"rule": "kat", "buffer": capacity, "min_samples": 1, "min_steps": 0}
    rule, again = (make_rule(settings_from(**fields), RunFacts(0, 9)) for _ in range(2))
    rule.end_step([Finished(m, False, True) for m in minima])
    again.load_state(json.loads(json.dumps(rule.state())))
    assert again.state()["buffer"] == minima[-capacity:] and again.samples == min(len(minima), capacity)
    for one in (rule, again):
        one.start_step(0)
    assert again.threshold == rule.threshold


def test_a_smaller_buffer_keeps_the_newest_minima(record):
    rule = make("kat", record)
    rule.load_state({"buffer": [float(i) for i in range(40)], "threshold": None})
    assert rule.state()["buffer"] == [float(i) for i in range(20, 40)]


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("kat", {}, "buffer: Field required"),
        ("kat", {"buffer": [0.5, "x"], "threshold": None}, r"buffer\.1: Input should be a valid number"),
        ("kat", {"buffer": [math.nan], "threshold": None}, r"buffer\.0: Input should be a finite number"),
        ("kat", {"budget": 3, "misses": 0}, "buffer: Field required"),
        ("prune_opd", {"budget": 0, "misses": 0}, "budget: .* greater than or equal to 1"),
        ("none", {"buffer": []}, "buffer: Extra inputs are not permitted"),
    ],
)
def test_a_state_of_another_rule_is_one_message(record, name, state, words):
    rule = make(name, record)
    before = rule.state()
    with pytest.raises(UserError, match=rf"saved: {words}.*; resume with the termination\.rule"):
        rule.load_state(state)
    assert rule.state() == before


def test_a_rule_without_these_methods_is_named(monkeypatch):
    class Forgetful:
        threshold, samples, budget = None, 0, None

        def start_step(self, step): ...
        def begin(self, start): ...
        def end_step(self, finished): ...

    class Settings(CuttingSettings):
        rule: str = "forgetful"

    monkeypatch.setitem(registry._OWN, "forgetful", RuleType(Settings, lambda settings, facts: Forgetful()))
    with pytest.raises(UserError, match=r"'forgetful': .*Forgetful has no state\(\) and no load_state\(\), which"):
        make_rule(Settings(), RunFacts(0, 9))
