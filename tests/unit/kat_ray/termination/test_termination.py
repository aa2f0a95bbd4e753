"""The KAT rule against a brute-force reading of its definition, and the monitor's ledger."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.errors import StateLost
from kat_ray.termination import Cut, Finished, NewTokens, RolloutStart, RunFacts, make_rule, make_table
from kat_ray.termination.calibration import MinimaBuffer, quantile
from kat_ray.termination.kat import KatRule, KatTracker
from kat_ray.termination.kat_table import KatTable, KatTableRule
from kat_ray.termination.settings import NoneSettings
from kat_ray.termination.table import TrackerTable
from kat_ray.termination.window import WindowMean
from kat_ray.types.records import EngineEnd, StopReason
from tests.support.chunks import chunk
from tests.support.rules import kl, rule_of


def reference(d, s, W, C, stride, exempt):
    """The definition of the method page, literally; returns (cut, confirmed, minimum up to there)."""
    streak, minimum = [], None
    for e in range(W, len(d) + 1):
        z = sum(d[e - W : e]) / W
        if (e - W) % stride:
            continue  # z is not defined there
        if not math.isnan(z) and (minimum is None or z < minimum):
            minimum = z
        if e - W < exempt:
            continue
        streak = [*streak, e] if z < s else []
        if len(streak) == C:
            return streak[0] - W, e, minimum
    return None, None, minimum


FACTS = RunFacts(seed=0, max_tokens=100)


# Multiples of 1/8 add up exactly in binary, so the brute-force sum and the prefix sums agree to the bit.
eighths = st.integers(0, 16).map(lambda n: n / 8)


@given(
    d=st.lists(st.one_of(eighths, st.just(math.nan)), max_size=40),
    s=eighths,
    W=st.integers(1, 6),
    C=st.integers(1, 4),
    stride=st.integers(1, 4),
    exempt=st.integers(0, 8),
    chunk=st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_tracker_follows_the_definition_however_the_values_arrive(d, s, W, C, stride, exempt, chunk):
    tracker = KatTracker(rule_of(window=W, consecutive=C, stride=stride, exempt=exempt), s, probe=False)
    for i in range(0, len(d), chunk):
        tracker.observe(kl(d[i : i + chunk]))
    cut, confirmed, minimum = reference(d, s, W, C, stride, exempt)
    assert (tracker.cut.at, tracker.cut.confirmed) == (cut, confirmed) if cut is not None else tracker.cut is None
    assert tracker.minimum == minimum


def test_cut_lies_at_the_start_of_the_first_low_window_of_the_streak():
    # W = 4, C = 2, s = 0.5. z(4) = 1, z(5) = 0.75, z(6) = 0.5 (not below), z(7) = 0.25, z(8) = 0:
    # the streak is z(7), z(8); its first window covers tokens 3..6, so the cut is at token 3.
    tracker = KatTracker(rule_of(), 0.5, probe=False)
    cut = tracker.observe(kl([1.0] * 4 + [0.0] * 6))
    assert (cut.at, cut.confirmed) == (3, 8)
    assert tracker.seen == 8 and tracker.minimum == 0.0


def test_a_minimum_is_that_of_the_windows_that_stride_leaves():
    # W = 2, stride 2: z(2) = 1, z(4) = 0.5, z(6) = 0.75. The windows between them hold 0 and 0.25.
    d, rule = [2.0, 0.0, 0.0, 1.0, -0.5, 2.0], rule_of(window=2, consecutive=3, stride=2, exempt=0)
    tracker, table = KatTracker(rule, 0.1, probe=False), KatTable(rule, 0.1, [False])
    tracker.observe(kl(d))
    table.observe(np.array([0]), kl(d), np.array([0]), np.array([6]))
    assert tracker.minimum == table.tracker_state(0).minimum == 0.5


def test_a_probe_is_followed_past_its_would_be_cut():
    d = [1.0] * 4 + [0.25] * 6 + [0.0] * 4
    cut_one = KatTracker(rule_of(), 0.5, probe=False)
    probe = KatTracker(rule_of(), 0.5, probe=True)
    cut_one.observe(kl(d)), probe.observe(kl(d))
    assert cut_one.cut == probe.cut
    assert cut_one.minimum > 0.0 and probe.minimum == 0.0 and probe.seen == len(d)


def test_no_threshold_no_cut():
    assert KatTracker(rule_of(), None, probe=False).observe(kl([0.0] * 100)) is None


@given(st.lists(st.floats(0, 50), max_size=200), st.integers(1, 20))
def test_window_equals_numpy_prefix_sums_to_the_bit(values, width):
    window = WindowMean(width)
    online = [window.push(v) for v in values]
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    for e in range(1, len(values) + 1):
        expected = None if e < width else (prefix[e] - prefix[e - width]) / width
        assert online[e - 1] == expected


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_equals_numpy(values, q):
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-12)


def test_quantile_refuses_no_values():
    with pytest.raises(ValueError, match="0 values"):
        quantile([], 0.5)


def test_buffer_forgets_the_oldest():
    buffer = MinimaBuffer(2, eta=0.5)
    for value in (9.0, 1.0, 3.0):
        buffer.add(value)
    assert len(buffer) == 2 and buffer.threshold() == 2.0


def test_rule_waits_for_samples_and_steps():
    rule = KatRule(rule_of(min_samples=2, min_steps=1, eta=0.5))
    rule.start_step(0)
    assert rule.threshold is None
    rule.end_step([Finished(1.0, cut=False, probe=False), Finished(None, cut=False, probe=True)])
    rule.start_step(1)
    assert rule.threshold is None  # one minimum only: the other rollout had no full window
    rule.end_step([Finished(3.0, cut=False, probe=False)])
    rule.start_step(2)
    assert rule.threshold == 2.0
    early = KatRule(rule_of(min_samples=1, min_steps=5))
    early.end_step([Finished(1.0, cut=False, probe=False)])
    early.start_step(4)
    assert early.threshold is None
    early.start_step(5)
    assert early.threshold == 1.0


@pytest.mark.parametrize(
    ("source", "expected"), [("probes", {2.0}), ("finished", {2.0, 3.0}), ("all", {1.0, 2.0, 3.0})]
)
def test_calibration_admits_what_it_says(source, expected):
    rule = KatRule(rule_of(calibrate_on=source, buffer=3, min_samples=3))
    rule.end_step([Finished(9.0, cut=False, probe=False)] * 3)  # inactive: all feed
    rule.start_step(1)
    assert rule.threshold == 9.0
    rule.end_step([Finished(1.0, True, False), Finished(2.0, False, True), Finished(3.0, False, False)])
    assert set(rule._buffer._values) - {9.0} == expected


def active_monitor(**changes):
    """A monitor whose threshold is 0.5 from step 1 on."""
    monitor = TrapMonitor(rule_of(**changes), FACTS)
    monitor.start_step(0, [100], [False])
    monitor.observe(chunk([100], [0], [[0.5] * 4], [EngineEnd.EOS]))
    monitor.end_step()
    return monitor


def test_monitor_cuts_spares_probes_and_closes_each_rollout_once():
    monitor = active_monitor()
    assert monitor.start_step(1, [0, 1, 2], [False, True, False]).threshold == 0.5
    first = monitor.observe(chunk([0, 1, 2], [0, 0, 0], [[1.0] * 4, [1.0] * 4, [1.0] * 4]))
    assert first.rollout_ids.size == 0
    decision = monitor.observe(chunk([0, 1, 2], [4, 4, 4], [[0.0] * 4, [0.0] * 4, [1.0]], [0, 1, 2]))
    assert decision.rollout_ids.tolist() == [0]
    late = monitor.observe(chunk([0], [8], [[0.0] * 3], [EngineEnd.EOS]))  # on its way when it was cut
    assert late.rollout_ids.size == 0 and monitor.stats()["late_tokens"] == 3
    outcomes = monitor.end_step().outcomes
    assert [o.stop_reason for o in outcomes] == [StopReason.TRAPPED, StopReason.EOS, StopReason.MAX_TOKENS]
    assert [(o.cut, o.confirmed) for o in outcomes] == [(3, 8), (None, None), (None, None)]
    assert [o.would_cut for o in outcomes] == [None, 3, None]
    assert [o.scored for o in outcomes] == [8, 8, 5]
    assert monitor.stats()["open_rollouts"] == 0


def test_trap_in_the_last_chunk_wins_over_eos():
    monitor = active_monitor()
    monitor.start_step(1, [0], [False])
    monitor.observe(chunk([0], [0], [[1.0] * 4 + [0.0] * 4], [EngineEnd.EOS]))
    assert monitor.end_step().outcomes[0].stop_reason is StopReason.TRAPPED


def test_monitor_refuses_gaps_and_open_rollouts():
    monitor = active_monitor()
    monitor.start_step(1, [0, 1], [False, False])
    with pytest.raises(StateLost, match="starts at token 2, but 0"):
        monitor.observe(chunk([0], [2], [[1.0]]))
    with pytest.raises(AssertionError, match="2 rollouts have not ended"):
        monitor.end_step()
    monitor.observe(chunk([0, 1], [0, 0], [[], [1.0]], [EngineEnd.FAILED, EngineEnd.EOS]))
    assert [o.stop_reason for o in monitor.end_step().outcomes] == [StopReason.FAILED, StopReason.EOS]


def test_calibration_does_not_depend_on_the_order_of_arrival():
    thresholds = []
    for order in ([0, 1, 2], [2, 1, 0]):
        monitor = TrapMonitor(rule_of(buffer=2), FACTS)
        monitor.start_step(0, [0, 1, 2], [False] * 3)
        for i in order:
            monitor.observe(chunk([i], [0], [[float(i)] * 4], [EngineEnd.EOS]))
        monitor.end_step()
        thresholds.append(monitor.start_step(1, [3], [False]).threshold)
    assert thresholds[0] == thresholds[1]


def test_none_rule_never_cuts():
    rule = make_rule(NoneSettings(), FACTS)
    rule.start_step(0)
    tracker = rule.begin(RolloutStart(1, probe=False))
    assert tracker.observe(kl([0.0] * 500)) is None and tracker.seen == 500
    assert rule.threshold is None and rule.samples == 0


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_rollouts_followed_together_end_as_each_alone_to_the_bit(data):
    """Random values (not only those that add up exactly), settings, probes and chunks, some rollouts silent."""
    draw = data.draw
    rule = rule_of(
        window=draw(st.integers(1, 6)), consecutive=draw(st.integers(1, 4)), stride=draw(st.integers(1, 3)),
        exempt=draw(st.integers(0, 8)),
    )  # fmt: skip
    threshold = draw(st.one_of(st.none(), st.floats(0, 2)))
    probes = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    value = st.one_of(st.floats(0, 3, width=32), st.just(0.1), st.just(math.nan))
    table = KatTable(rule, threshold, probes)
    trackers = [KatTracker(rule, threshold, probe) for probe in probes]
    for _ in range(draw(st.integers(1, 6))):
        rows = np.array(draw(st.permutations(range(len(probes)))))[: draw(st.integers(0, len(probes)))]
        pieces = [np.array(draw(st.lists(value, max_size=9)), dtype=np.float32) for _ in rows]
        count = np.array([len(p) for p in pieces], dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(count)])[:-1].astype(np.int64)
        d = np.concatenate([*pieces, np.zeros(0, np.float32)])
        cuts, confirmed = table.observe(rows, NewTokens(d), first, count)
        for i, (row, piece) in enumerate(zip(rows.tolist(), pieces, strict=True)):
            cut = trackers[row].observe(NewTokens(piece))
            assert (cuts[i], confirmed[i]) == ((cut.at, cut.confirmed) if cut else (-1, -1))
    for row, tracker in enumerate(trackers):
        followed = table.tracker_state(row)
        assert (followed.cut, followed.minimum, followed.threshold) == (tracker.cut, tracker.minimum, threshold)


def test_rules_without_a_table_are_followed_one_by_one_with_all_features():
    class Overlap:
        threshold = minimum = cut = weights = None
        seen = 0

        def observe(self, tokens):
            self.seen += len(tokens.d)
            low = np.flatnonzero(tokens.overlap < 0.5)
            if len(low):
                self.cut = Cut(int(low[0]), self.seen)
            return self.cut

    table = TrackerTable([Overlap(), Overlap()])
    tokens = NewTokens(d=np.zeros(5), token_ids=np.arange(5), overlap=np.array([1, 1, 1, 0.25, 1]))
    cuts, confirmed = table.observe(np.array([1, 0]), tokens, np.array([0, 2]), np.array([2, 3]))
    assert (cuts.tolist(), confirmed.tolist()) == ([-1, 1], [-1, 3])
    assert table.tracker_state(0).cut == Cut(1, 3) and table.tracker_state(1).cut is None
    assert isinstance(make_table(KatTableRule(rule_of()), []), KatTable)
    assert isinstance(make_table(make_rule(NoneSettings(), FACTS), []), TrackerTable)
