"""A threshold from a budget: what cuts remove of the KL of rollouts that were seen to their end."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.analysis.replay import with_changes
from kat_ray.termination import RULES, Finished, NewTokens, RolloutStart, RunFacts, make_rule, make_table
from kat_ray.termination.calibration import ShareBuffer
from kat_ray.termination.kat import KatRule, KatTracker
from kat_ray.termination.staircase import Staircase, staircase
from tests.support.rules import kl, rule_of

FACTS = RunFacts(0, 100)
rows = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.floats(0, 4)), max_size=30),
    min_size=1, max_size=12,
)  # fmt: skip
shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6))


def shaped(shape, **changes):
    window, consecutive, stride, exempt = shape
    return rule_of(window=window, consecutive=consecutive, stride=stride, exempt=exempt, **changes)


def share_lost(values, rule, threshold):
    """What the rule itself removes of a rollout, by its tracker."""
    tracker = KatTracker(rule, threshold, probe=True)
    tracker.observe(kl(values))
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    total = values.sum()
    return float(values[tracker.cut.at :].sum() / total) if tracker.cut and total > 0 else 0.0


def filled(stairs, budget, capacity=1000):
    buffer = ShareBuffer(capacity, budget)
    for one in stairs:
        buffer.add(one)
    return buffer


def test_a_staircase_by_hand():
    one = staircase(np.array([4.0, 1.0, 3.0, 2.0]), rule_of(window=1, consecutive=1))
    # Below 4 the cut is at token 0, which loses all; at or below 1 nothing is low; between, token 1: 6 of 10.
    assert (one.value.tolist(), one.share.tolist()) == ([4.0, 1.0], [1.0, 0.6])
    # Pairs: z = 3, 1, 1, 4; two in a row: 3, 1, 4. The last is no jump: an earlier streak is lower.
    two = staircase(np.array([4.0, 2.0, 0.0, 2.0, 6.0]), rule_of(window=2, consecutive=2))
    assert (two.value.tolist(), two.share.tolist()) == ([3.0, 1.0], [1.0, 10 / 14])
    exempt = staircase(np.array([4.0, 2.0, 0.0, 2.0, 6.0]), rule_of(window=2, consecutive=2, exempt=1))
    assert (exempt.value.tolist(), exempt.share.tolist()) == ([1.0], [10 / 14])
    assert not len(staircase(np.array([1.0, 1.0]), rule_of(window=2, consecutive=2)).value)
    assert staircase(np.zeros(3), rule_of(window=1, consecutive=1)).share.tolist() == [0.0], (
        "no KL, nothing to lose"
    )


def test_a_threshold_by_hand():
    first = Staircase(np.array([3.0, 1.0]), np.array([1.0, 0.2]))
    second = Staircase(np.array([2.0]), np.array([0.4]))
    # Shares lost in all: above 1 nats 0.2, above 2 0.6, above 3 1.4. Allowed: b (n + 1) - 1.
    for budget, threshold in [(0.3, None), (0.35, 1.0), (0.5, 2.0), (0.6, 3.0), (0.7, 3.0)]:
        assert filled([first, second], budget).threshold() == threshold, budget
    assert filled([first, second], 0.9).threshold() == math.nextafter(3.0, math.inf)
    assert filled([], 0.9).threshold() is None
    assert filled([Staircase(np.zeros(0), np.zeros(0))] * 9, 0.9).threshold() is None, "nobody could be cut"


@given(rows, shapes, st.one_of(st.floats(0, 4), st.just(1.0)))
@settings(max_examples=300, deadline=None)
def test_a_staircase_says_what_the_rule_removes_under_every_threshold(values, shape, threshold):
    rule = shaped(shape)
    for row in values:
        stairs = staircase(np.array(row), rule)
        assert (np.diff(stairs.value) < 0).all() and (np.diff(stairs.share) <= 1e-12).all()
        taken = np.flatnonzero(stairs.value < threshold)
        expected = share_lost(row, rule, threshold)
        assert (stairs.share[taken[0]] if len(taken) else 0.0) == pytest.approx(expected, abs=1e-9)


@given(rows, shapes, st.floats(0.02, 0.95))
@settings(max_examples=300, deadline=None)
def test_on_its_own_buffer_it_stays_within_the_budget_and_uses_it(values, shape, budget):
    rule = shaped(shape)
    stairs = [staircase(np.array(row), rule) for row in values]
    threshold = filled(stairs, budget).threshold()

    def bound(at):
        return (sum(share_lost(row, rule, at) for row in values) + 1) / (len(values) + 1)

    if threshold is None:
        assert 1 / (len(values) + 1) > budget or not any(len(s.value) for s in stairs)
        return
    assert bound(threshold) <= budget + 1e-9
    assert sum(share_lost(row, rule, threshold) for row in values) / len(values) <= budget + 1e-9
    above = [v for s in stairs for v in s.value if v >= threshold]
    if above:
        assert bound(math.nextafter(min(above), math.inf)) > budget - 1e-9, "a larger threshold would break it"


@given(rows, shapes)
@settings(max_examples=150, deadline=None)
def test_more_budget_cuts_no_less_and_none_cuts_nothing(values, shape):
    stairs = [staircase(np.array(row), shaped(shape)) for row in values]
    assert filled(stairs, 0.0).threshold() is None
    found = [filled(stairs, b).threshold() for b in np.arange(0.0, 1.0, 0.05)]
    found = [-1.0 if t is None else t for t in found]
    assert found == sorted(found)


@given(rows, shapes, st.floats(0.05, 0.9), st.integers(-6, 6))
@settings(max_examples=150, deadline=None)
def test_it_does_not_depend_on_the_scale_of_the_kl(values, shape, budget, power):
    rule, factor = shaped(shape), 2.0**power
    plain = filled([staircase(np.array(row), rule) for row in values], budget).threshold()
    scaled = filled([staircase(np.array(row) * factor, rule) for row in values], budget).threshold()
    if plain is None:
        assert scaled is None
    else:
        assert scaled == pytest.approx(plain * factor, rel=1e-12, abs=1e-300)


@given(rows, shapes, st.integers(1, 7), st.sampled_from([None, 0.7]))
@settings(max_examples=150, deadline=None)
def test_evidence_is_that_of_the_whole_rollout_in_whatever_pieces(values, shape, size, threshold):
    """Of probes, and of all while nothing is cut; of others none, since a cut hides what it removed."""
    rule = shaped(shape, budget=0.5, buffer=20)
    kat = make_rule(rule, FACTS)
    kat.threshold = threshold
    starts = [RolloutStart(i, probe=i % 2 == 0) for i in range(len(values))]
    table = make_table(kat, starts)
    for at in range(0, 30, size):
        parts = [np.array(row[at : at + size], dtype=np.float64) for row in values]
        counts = np.array([len(p) for p in parts])
        tokens = NewTokens(np.concatenate([np.zeros(0), *parts]))
        table.observe(np.arange(len(values)), tokens, np.cumsum(counts) - counts, counts)
    for i, (row, start) in enumerate(zip(values, starts, strict=True)):
        tracker = KatTracker(rule, threshold, start.probe)
        tracker.observe(kl(row))
        for found in (table.tracker_state(i).evidence, tracker.evidence):
            if not start.probe and threshold is not None:
                assert found is None
                continue
            expected = staircase(np.array(row), rule)
            assert found.value.tolist() == expected.value.tolist()
            assert found.share.tolist() == expected.share.tolist()


def rollouts_of(rng, count, scale, longest):
    """Rollouts of which a third falls into a stretch of hardly any KL at a place of its own; lengths are random."""
    for _ in range(count):
        length = int(rng.integers(longest // 4, longest))
        values = rng.exponential(1.0, length) * scale * rng.lognormal(0.0, 0.7)
        if rng.random() < 1 / 3:
            start = int(rng.integers(length))
            values[start:] *= 0.02
        yield values


def test_what_a_new_rollout_loses_is_within_the_budget_on_average():
    """Over many buffers and new rollouts: the bound's promise, and no more than a third of the budget unused."""
    rng = np.random.default_rng(3)
    rule, budget, lost = rule_of(window=4, consecutive=3), 0.1, []
    for _ in range(120):
        stairs = [staircase(v, rule) for v in rollouts_of(rng, 60, 1.0, 60)]
        threshold = filled(stairs, budget).threshold()
        lost += [share_lost(v, rule, threshold) for v in rollouts_of(rng, 20, 1.0, 60)]
    error = np.std(lost) / math.sqrt(len(lost))
    assert np.mean(lost) < budget + 2 * error
    assert np.mean(lost) > budget / 3


def run(drift, seed, budget):
    """The steps, and what each rollout lost that could be cut; the student changes at step 25."""
    rng = np.random.default_rng(seed)
    rule = rule_of(window=4, consecutive=6, budget=budget, buffer=96, min_samples=32, probe_share=0.15)
    kat, lost = KatRule(rule), []
    for step in range(60):
        scale = 0.5 if step >= 25 and drift == "scale halves" else 1.0
        longest = 120 if step >= 25 and drift == "lengths double" else 60
        kat.start_step(step)
        finished = []
        for values in rollouts_of(rng, 64, scale, longest):
            probe = bool(rng.random() < rule.probe_share)
            tracker = KatTracker(rule, kat.threshold, probe)
            tracker.observe(kl(values))
            finished.append(Finished(tracker.minimum, tracker.cut is not None, probe, evidence=tracker.evidence))
            if kat.threshold is not None and not probe:
                lost.append((step, share_lost(values, rule, kat.threshold)))
        kat.end_step(finished)
    return np.array(lost).T


@pytest.mark.parametrize("drift", ["scale halves", "lengths double"])
def test_it_holds_while_the_student_changes(drift):
    """With the probes of the last ten steps: before the change, and once all of them are newer than it.

    In between the threshold lags, and half as much again is lost at most.
    """
    budget = 0.1
    runs = [run(drift, seed, budget) for seed in range(4)]
    steps, shares = np.concatenate(runs, axis=1)
    for part, most in ((steps < 25, 1.15), ((steps >= 25) & (steps < 40), 1.5), (steps >= 40, 1.15)):
        assert budget / 3 < shares[part].mean() < most * budget


def test_probes_are_as_many_as_renew_a_full_buffer_in_ten_steps():
    rule = rule_of(window=1, consecutive=1, budget=0.05, buffer=40, probe_share=0.1)
    kat, seen = KatRule(rule), staircase(np.array([2.0, 1.0, 0.0]), rule)

    def step(number, rollouts):
        kat.start_step(number)
        share = kat.probe_share
        kat.end_step([Finished(0.0, cut=False, probe=True, evidence=seen)] * rollouts)
        return share

    assert [step(0, 30), step(1, 80)] == [None, None], "the buffer was not full"
    assert step(2, 1000) == 40 / (10 * 80)
    assert step(3, 20) == 0.01, "40 / 10,000 would be fewer than one in a hundred"
    assert step(4, 20) == 0.1, "no more than the setting"
    again = KatRule(rule)
    again.load_state(kat.state())
    kat.start_step(5)
    again.start_step(5)
    assert again.probe_share == kat.probe_share == 0.1
    paper = KatRule(rule_of(buffer=1, min_samples=1))
    paper.end_step([Finished(1.0, cut=False, probe=True)])
    paper.start_step(1)
    assert paper.threshold is not None and paper.probe_share is None
    monitor = TrapMonitor(rule, FACTS)
    assert monitor.start_step(5, state=kat.state()).probe_share == 0.1


def test_a_replay_tries_budgets_that_the_buffer_allows():
    rule = rule_of(budget=0.02, buffer=96)
    tried = RULES["kat"].sweep(rule, 100)
    assert tried["budget"] == [0.02, 0.03, 0.05, 0.1] and "eta" not in tried
    for budget in tried["budget"]:
        with_changes(rule, {"budget": budget})
    assert with_changes(rule, {"eta": 0.5}).budget is None, "the one that is named sets the threshold"


def test_settings_that_could_never_cut_are_refused():
    with pytest.raises(ValidationError, match="buffer = 20: must be >= 49"):
        rule_of(budget=0.02, buffer=20)
    with pytest.raises(ValidationError, match="calibrate_on = all: must be probes with a budget"):
        rule_of(budget=0.1, calibrate_on="all")
    with pytest.raises(ValidationError, match="less than 1"):
        rule_of(budget=1.0)
    assert rule_of(budget=0.02, buffer=49).budget == 0.02
