"""The other termination rules: what each cuts, and that seeds decide."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.termination import (
    RULES,
    Finished,
    NewTokens,
    RolloutStart,
    RunFacts,
    make_rule,
)
from kat_ray.termination.length_matched import survival
from kat_ray.termination.repetition import RepetitionSettings, RepetitionTracker
from kat_ray.types.records import EngineEnd, StepStart, StopReason
from tests.support.chunks import chunk
from tests.support.rules import kl, recorded_run, settings_from


def rule_from(seed=3, max_tokens=50, **fields):
    return make_rule(settings_from(**fields), RunFacts(seed, max_tokens))


def follow(rule, tokens, rollout_id=0, step=0, size=7):
    """Run one rollout of these tokens through a rule, `size` at a time."""
    rule.start_step(step)
    tracker = rule.begin(RolloutStart(rollout_id, probe=False))
    for i in range(0, len(tokens), size):
        part = tokens[i : i + size]
        tracker.observe(NewTokens(np.full(len(part), 0.5), np.array(part)))
    return tracker.cut


def test_the_builtin_rules_are_known_by_name():
    assert {"none", "kat", "fixed_prefix", "random", "length_matched", "repetition"} <= set(RULES)
    assert {"prune_opd", "progressive", "kat_stages"} <= set(RULES)
    assert all(name == kind.name for name, kind in RULES.items())


@pytest.mark.parametrize("size", [1, 5, 100])
def test_fixed_prefix_keeps_n_tokens_of_what_goes_on(size):
    rule = rule_from(rule="fixed_prefix", n=10)
    assert follow(rule, [4] * 10, size=size) is None
    cut = follow(rule, [4] * 30, size=size)
    assert (cut.at, cut.confirmed) == (10, 11)


def test_random_lengths_are_uniform_and_seeded():
    rule = rule_from(rule="random", longest=5)
    cuts = [follow(rule, [4] * 10, rollout_id=i).at for i in range(2000)]
    shares = Counter(cuts)
    assert set(shares) == {1, 2, 3, 4, 5} and all(abs(n / 2000 - 0.2) < 0.04 for n in shares.values())
    assert cuts[:50] == [follow(rule, [4] * 10, rollout_id=i).at for i in range(50)]
    other = rule_from(rule="random", longest=5, seed=4)
    assert cuts[:50] != [follow(other, [4] * 10, rollout_id=i).at for i in range(50)]


def test_length_matched_makes_rollouts_as_long_as_those_it_copies(tmp_path):
    """Where KAT cuts the long ones only, dealing its cuts out would leave rollouts too long."""
    rng = np.random.default_rng(0)

    def rollout(i):
        trapped = i % 2 == 0  # trapped ones run into the limit, the others end early
        length = 200 if trapped else int(rng.integers(20, 60))
        probe = i % 5 == 0
        return length, int(rng.integers(10, 90)) if trapped and not probe else None, probe

    steps = [[rollout(i) for i in range(200)] for _ in range(12)]
    rule = rule_from(rule="length_matched", run=recorded_run(tmp_path / "kat", steps), max_tokens=200)
    rollouts = list(itertools.chain(*steps))
    kept = np.array([cut or length for length, cut, probe in rollouts if not probe])
    natural = [length for length, _, probe in rollouts if probe]
    rule.start_step(6)
    matched = []
    for i, length in enumerate(natural * 5):
        cut = rule.begin(RolloutStart(i, probe=False)).observe(NewTokens(np.zeros(length, np.float32)))
        matched.append(cut.at if cut else length)
    assert np.mean(matched) == pytest.approx(kept.mean(), rel=0.04)
    deciles = np.arange(0.1, 1, 0.1)
    assert np.allclose(np.quantile(matched, deciles), np.quantile(kept, deciles), atol=6)


def test_length_matched_by_hand(tmp_path):
    # Kept 2, 2, 4, 4; uncut 4, 4, 2, 4: P(kept > 2) = 1/2, P(uncut > 2) = 3/4, so 1/3 of the cuts lie at 2.
    assert survival(np.array([2, 2, 4, 4]), np.array([4, 4, 2, 4])).tolist() == pytest.approx(
        [1, 1, 2 / 3, 2 / 3, 2 / 3]
    )
    # No rollout gets beyond 4, where nothing says what the rest would be: the others are not cut.
    active = [(9, 3, False), (9, 3, False), (9, None, True)]
    run = recorded_run(tmp_path / "kat", [[(9, None, False)] * 3, active])
    rule = rule_from(rule="length_matched", run=run)
    assert follow(rule, [4] * 20, step=0) is None, "the recorded rule was not active yet"
    assert follow(rule, [4] * 20, step=1).at == 3
    assert follow(rule, [4] * 20, step=7).at == 3, "past the record's end: its last step"
    assert follow(rule, [4] * 3, step=1) is None, "a rollout that ends before its length is not cut"
    cuts = [follow(rule, [4] * 20, rollout_id=i, step=1) for i in range(3)]
    assert cuts == [follow(rule, [4] * 20, rollout_id=i, step=1) for i in range(3)]


def test_length_matched_needs_a_run_that_cut(tmp_path):
    with pytest.raises(UserError, match="no traces in it"):
        rule_from(rule="length_matched", run=str(tmp_path))
    run = recorded_run(tmp_path / "none", [[(9, None, False)] * 2])
    with pytest.raises(UserError, match="that run cut no rollouts"):
        rule_from(rule="length_matched", run=run)
    run = recorded_run(tmp_path / "no-probes", [[(9, 3, False)] * 2])
    with pytest.raises(UserError, match="that run kept no probes"):
        rule_from(rule="length_matched", run=run)
    (file,) = (tmp_path / "no-probes" / "traces").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"step-000000.parquet is damaged.*needs the whole run"):
        rule_from(rule="length_matched", run=run)


def test_repetition_by_hand():
    # 9, then 1 2 3 three times: the third is complete at token 10, the second begins at token 4.
    rule = rule_from(rule="repetition", repeats=3, min_period=2)
    cut = follow(rule, [9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2])
    assert (cut.at, cut.confirmed) == (4, 10)
    assert follow(rule, [9, 1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3]) is None
    assert follow(rule, [5, 5, 5]) is None, "period 1 is below min_period"
    assert follow(rule, [5] * 6).confirmed == 6, "and 5 5 is a period of 2"


def loop_by_definition(tokens, rule):
    for end in range(1, len(tokens) + 1):
        for period in range(rule.min_period, rule.max_period + 1):
            whole = period * rule.repeats
            if whole <= end and tokens[end - whole : end] == tokens[end - period : end] * rule.repeats:
                return end - period * (rule.repeats - 1), end
    return None


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(2, 4),
    st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_repetition_follows_its_definition(tokens, shortest, more, repeats, size):
    rule = RepetitionSettings(min_period=shortest, max_period=shortest + more, repeats=repeats)
    tracker = RepetitionTracker(rule)
    for i in range(0, len(tokens), size):
        part = np.array(tokens[i : i + size], dtype=np.int32)
        tracker.observe(NewTokens(np.zeros(len(part)), part))
    expected = loop_by_definition(tokens, rule)
    assert (None if tracker.cut is None else (tracker.cut.at, tracker.cut.confirmed)) == expected
    assert tracker.seen == len(tokens)


def test_random_lengths_reach_up_to_the_longest_rollout_by_default():
    rule = rule_from(rule="random", max_tokens=4)
    assert {follow(rule, [4] * 9, rollout_id=i).at for i in range(200)} == {1, 2, 3, 4}


def overlapping(rule, shares, size=3, probe=False):
    tracker = rule.begin(RolloutStart(0, probe=probe))
    for i in range(0, len(shares), size):
        part = np.array(shares[i : i + size], dtype=np.float32)
        tracker.observe(NewTokens(np.zeros(len(part)), np.zeros(len(part), np.int32), part))
    return tracker


@pytest.mark.parametrize("size", [1, 3, 100])
def test_prune_opd_weights_by_hand(size):
    rule = rule_from(rule="prune_opd", level=0.7, decay=0.25)
    # Bad tokens: 1, 3, 4, 6. A NaN (overlap not known) and 0.7 itself are not bad.
    tracker = overlapping(rule, [1.0, 0.5, 0.75, 0.0, 0.6, math.nan, 0.1, 1.0], size)
    assert tracker.weights == [1.0, 0.75, 0.75, 0.5, 0.25, 0.25, 0.0, 0.0]
    assert (tracker.cut.at, tracker.cut.confirmed, tracker.seen) == (6, 7, 8)


@given(st.lists(st.one_of(st.floats(0, 1, width=32), st.just(math.nan)), max_size=60), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_prune_opd_follows_its_formula(shares, size):
    rule = rule_from(rule="prune_opd", decay=0.125)
    tracker = overlapping(rule, shares, size)
    bad = np.cumsum([s < 0.7 for s in shares])
    assert np.allclose(tracker.weights, np.clip(1 - 0.125 * bad, 0, 1))
    assert tracker.cut is None or tracker.weights[tracker.cut.at] == 0 < min(
        tracker.weights[: tracker.cut.at] or [1]
    )


def test_prune_opd_budget_grows_when_it_is_filled_and_shrinks_after_three_misses():
    rule = rule_from(rule="prune_opd", start=30, growth=10, shortest=15, patience=3, full_share=0.1)
    full, short = Finished(None, False, False, 30, full=True), Finished(None, False, False, 5)
    probe = Finished(None, False, True, 50, full=True)
    budgets = [rule.budget]
    for step in (
        [short] * 9 + [full],
        [short] * 10 + [full],
        [short, probe],
        [short],
        [short],
        [short] * 9 + [full],
    ):
        rule.end_step(step)
        budgets.append(rule.budget)
    # 1 of 10 fills it: +10; 1 of 11 is below a tenth: a miss, and so are the next two: -10; then +10.
    assert budgets == [30, 40, 40, 40, 30, 30, 40]
    for _ in range(20):
        rule.end_step([full])
    assert rule.budget == 50, "never above rollout.max_tokens"
    for _ in range(30):
        rule.end_step([short])
    assert rule.budget == 15


def test_progressive_horizon_by_hand():
    rule = rule_from(rule="progressive", start=10, steps=4, max_tokens=50)
    budgets = []
    for step in (0, 1, 2, 4, 9):
        rule.start_step(step)
        budgets.append(rule.budget)
    assert budgets == [10, 20, 30, 50, 50]
    assert rule.begin(RolloutStart(0, False)).observe(NewTokens(np.zeros(500))) is None


# W = 4, C = 2, threshold 0.5. z(4) = 1, .75, .5, .25 (e = 7), 0 (e = 8): cut at 3. Token 8 lifts z(9) to 0.5.
STAGES = [1.0] * 4 + [0.0] * 4 + [2.0] * 3


@pytest.mark.parametrize(
    ("put_back", "expected"),
    [
        ("nothing", [1] * 3 + [0] * 8),
        ("agreement", [1] * 8 + [0] * 3),
        ("after", [1] * 3 + [0] * 5 + [1] * 3),
    ],
)
def test_stages_by_hand(put_back, expected):
    from kat_ray.termination.kat_stages import KatStagesSettings, StagesTracker

    rule = KatStagesSettings(window=4, consecutive=2, exempt=0, put_back=put_back)
    tracker = StagesTracker(rule, 0.5, probe=False)
    for value in STAGES:
        assert tracker.observe(kl([value])) is None
    assert tracker.weights == expected and tracker.cut is None
    probe = StagesTracker(rule, 0.5, probe=True)
    probe.observe(kl(STAGES))
    assert probe.weights is None and probe.cut.at == 3
    uncut = StagesTracker(rule, None, probe=False)
    uncut.observe(kl(STAGES))
    assert uncut.weights is None and uncut.minimum == 0.0


def test_the_monitor_hands_weights_and_budget_on():
    monitor = TrapMonitor(settings_from(rule="prune_opd", decay=0.5, start=20), RunFacts(0, 50))
    assert monitor.start_step(0, [0, 1], [False, True]) == StepStart(None, 20)
    shares = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    monitor.observe(chunk([0, 1], [0, 0], [[1.0] * 3, [1.0] * 3], [EngineEnd.EOS, EngineEnd.EOS], overlap=shares))
    kept, probe = monitor.end_step().outcomes
    assert kept.weights.tolist() == [1.0, 0.5, 0.5] and kept.stop_reason is StopReason.EOS
    assert probe.weights.tolist() == [0.5, 0.0, 0.0] and probe.would_cut == 1


def test_the_monitor_works_online_with_any_rule():
    monitor = TrapMonitor(settings_from(rule="fixed_prefix", n=3), RunFacts(0, 50))
    assert monitor.start_step(0, [0, 1, 2], [False, True, False]) == StepStart(None, None)
    first = monitor.observe(chunk([0, 1, 2], [0, 0, 0], [[1.0] * 3, [1.0] * 3, [1.0] * 3], [0, 0, EngineEnd.EOS]))
    assert first.rollout_ids.size == 0
    second = monitor.observe(chunk([0, 1], [3, 3], [[math.nan] * 2, [1.0] * 2], [0, EngineEnd.EOS]))
    assert second.rollout_ids.tolist() == [0]
    outcomes = monitor.end_step().outcomes
    assert [o.stop_reason for o in outcomes] == [StopReason.TRAPPED, StopReason.EOS, StopReason.EOS]
    assert (outcomes[0].cut, outcomes[0].confirmed) == (3, 4)
    assert [o.would_cut for o in outcomes] == [None, 3, None]


def test_a_rule_is_chosen_and_refused_by_name(tmp_path):
    config = load_config("demo", ["termination.rule=repetition", "termination.repeats=5"])
    assert config.termination == RepetitionSettings(repeats=5)
    with pytest.raises(UserError, match=r"termination\.n"):
        load_config("demo", ["termination.rule=fixed_prefix", "termination.n=0"])
    with pytest.raises(UserError, match="fixed_prefix"):
        load_config("demo", ["termination.rule=fixed_prefx"])
    with pytest.raises(UserError, match="min_period"):
        load_config("demo", ["termination.rule=repetition", "termination.min_period=65"])
