"""Replays agree with the online rule to the bit, read damaged runs as far as they go, recommend with a reason."""

import csv
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.analysis.replay import Replayed, apply_rule, calibrate, load_traces, uncensored
from kat_ray.analysis.replay_rules import COLUMNS, follow, reproduce, sweep
from kat_ray.analysis.tradeoff import frontier, recommend, weigh
from kat_ray.cli import main as cli
from kat_ray.config import Config
from kat_ray.config.load import load_config, save_config
from kat_ray.data.prompt_order import is_probe
from kat_ray.errors import UserError
from kat_ray.records.traces import TokenFeatures, TraceRow, write_traces
from kat_ray.termination import Finished, NewTokens, RolloutStart, RunFacts, make_rule
from kat_ray.termination.kat import KatTracker
from kat_ray.types.records import StopReason
from tests.support.rules import rule_of, settings_from, traces_of

FACTS = RunFacts(seed=0, max_tokens=60)
values = st.lists(
    st.lists(st.one_of(st.floats(0, 2, width=32), st.just(math.nan)), max_size=40), min_size=1, max_size=8
)


@given(
    values, st.lists(st.one_of(st.floats(0, 2), st.just(math.nan)), min_size=8, max_size=8),
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_replay_is_the_online_rule_to_the_bit(rows, thresholds, window, consecutive, stride, exempt):
    rule = rule_of(window=window, consecutive=consecutive, stride=stride, exempt=exempt)
    traces = traces_of(rows, thresholds[: len(rows)])
    replayed = apply_rule(traces, rule, traces.threshold)
    for i, row in enumerate(rows):
        threshold = None if math.isnan(thresholds[i]) else thresholds[i]
        tracker = KatTracker(rule, threshold, probe=True)
        tracker.observe(NewTokens(np.array(row, dtype=np.float32)))
        expected = (tracker.cut.at, tracker.cut.confirmed) if tracker.cut else (-1, -1)
        assert (replayed.cut[i], replayed.confirmed[i]) == expected
        assert replayed.recovered[i] == (-1 if tracker.recovered is None else tracker.recovered)
        assert tracker.minimum == replayed.minimum[i] or (
            tracker.minimum is None and math.isnan(replayed.minimum[i])
        )


def test_calibration_follows_the_rule_step_by_step():
    # W = 4, min_samples = 1, eta = 0.5: step 1's threshold is step 0's only minimum, step 2's the median of both.
    rule = rule_of(eta=0.5, buffer=8, consecutive=1, calibrate_on="all")
    traces = traces_of([[4.0] * 4, [2.0] * 5, [2.5] * 4], steps=[0, 1, 2])
    thresholds, replayed = calibrate(traces, rule)
    assert math.isnan(thresholds[0]) and thresholds[1:].tolist() == [4.0, 3.0]
    assert replayed.cut.tolist() == [-1, 0, 0]


def test_once_active_a_replay_is_fed_as_a_run_would_be():
    """Of 200 rollouts a step a tenth are probes: the buffer of 40 is refilled in two steps, not in one fifth."""
    rule = rule_of(window=1, eta=0.5, buffer=40, min_samples=40, min_steps=1, probe_share=0.1)
    values = [[1.0]] * 200 + [[0.5]] * 800
    traces = traces_of(values, steps=np.repeat(np.arange(5), 200))
    thresholds, _ = calibrate(traces, rule, seed=3)
    assert thresholds[::200].tolist()[1:3] == [1.0, 1.0] and thresholds[-1] == 0.5
    probes = np.array([is_probe(3, i, 0.1) for i in range(1000)])
    thresholds, _ = calibrate(replace(traces, probe=probes), rule)
    assert thresholds[::200].tolist()[1:3] == [1.0, 1.0] and thresholds[-1] == 0.5


@pytest.mark.parametrize("calibrate_on", ["probes", "finished", "all"])
@pytest.mark.parametrize(("window", "consecutive", "stride", "exempt"), [(4, 2, 1, 0), (5, 3, 2, 3), (1, 1, 1, 0)])
def test_a_replay_s_thresholds_are_those_of_the_rule(calibrate_on, window, consecutive, stride, exempt):
    """The rule itself, step by step, on rollouts of which half fall into a trap of a depth of their own."""
    rng = np.random.default_rng(3)
    rule = rule_of(
        window=window, consecutive=consecutive, stride=stride, exempt=exempt, eta=0.5, buffer=60, min_samples=20,
        min_steps=2, probe_share=0.2, calibrate_on=calibrate_on,
    )  # fmt: skip
    rows = []
    for _ in range(12 * 25):
        d = rng.exponential(0.5, int(rng.integers(0, 60))).astype(np.float32)
        if rng.random() < 0.5:
            d[20:] *= rng.random() ** 2
        if rng.random() < 0.1:
            d[:5] = math.nan
        rows.append(d)
    traces = traces_of(rows, steps=np.repeat(np.arange(12), 25))
    made, expected, cuts = make_rule(rule, FACTS), [], []
    for step in range(12):
        made.start_step(step)
        finished = []
        for i in range(25 * step, 25 * step + 25):
            probe = is_probe(FACTS.seed, i, rule.probe_share)
            tracker = made.begin(RolloutStart(i, probe))
            cut = tracker.observe(NewTokens(rows[i]))
            expected.append(math.nan if made.threshold is None else made.threshold)
            cuts.append(-1 if cut is None else cut.at)
            finished.append(
                Finished(tracker.minimum, cut=bool(cut and not probe), probe=probe, length=len(rows[i]), full=False)
            )
        made.end_step(finished)
    thresholds, replayed = calibrate(traces, rule, FACTS.seed)
    np.testing.assert_array_equal(thresholds, expected)
    assert replayed.cut.tolist() == cuts and 30 < sum(cut >= 0 for cut in cuts) < 300


def test_a_run_s_own_probes_stand_for_all_rollouts_where_others_feed_the_rule_too():
    """All of step 1 go from 1 to 0.1, over a window of 0.55, under a threshold of 1."""
    traces = traces_of(
        [[1.0] * 4] * 50 + [[1.0] * 4 + [0.1] * 4] * 100, steps=np.repeat(range(3), 50), probe=[True] * 150
    )
    found = {}
    for calibrate_on in ("probes", "finished", "all"):
        rule = rule_of(
            window=2, consecutive=1, eta=0.5, buffer=50, min_samples=50, min_steps=1, probe_share=0.1,
            calibrate_on=calibrate_on,
        )  # fmt: skip
        found[calibrate_on] = calibrate(traces, rule)[0][-1]
    assert found == {
        "probes": pytest.approx(0.1),  # the whole of each
        "finished": 1.0,  # all were cut, but the few that stand for probes
        "all": pytest.approx(0.55),  # the window that confirmed the cut
    }


def test_shares_by_hand():
    rule = rule_of()  # W = 4, C = 2
    low = [1.0] * 4 + [0.0] * 6  # under 0.5: cut at 3, confirmed at 8 of 10
    traces = traces_of([low, [1.0] * 10, low, low], [0.5, 0.5, math.nan, 0.5], correct=[1, 1, 1, 0])
    active = ~np.isnan(traces.threshold)
    figures = weigh(traces, rule, active, apply_rule(traces, rule, traces.threshold))
    assert figures.rollouts == 3 and figures.cut_share == pytest.approx(2 / 3)
    assert figures.kept_tokens == pytest.approx((3 + 10 + 3) / 30)
    assert figures.generated_tokens == pytest.approx((8 + 10 + 8) / 30)
    assert figures.kept_kl == pytest.approx((3 + 10 + 3) / 18)
    assert figures.false_cut_share == pytest.approx(1 / 3) and figures.right_share == pytest.approx(2 / 3)


def test_what_a_cut_removed_is_only_known_of_probes():
    traces = traces_of([[1.0]] * 4, probe=[True, False, False, True], trapped=[False, True, False, False])
    random = load_config("demo", ["termination.rule=random"])
    assert uncensored(traces, random).rollout_id.tolist() == [0, 3]
    kat = load_config("demo")
    early = replace(traces, threshold=np.array([0.5, 0.5, math.nan, 0.5]))
    assert uncensored(early, kat).rollout_id.tolist() == [0, 2, 3], "the rule was not active for the third"
    assert uncensored(traces_of([[1.0]] * 4), load_config("demo", ["termination.rule=none"])).d.size == 4
    # A rule may end rollouts by their length alone: none is trapped, and yet only probes were seen to their end.
    bounded = load_config("demo", ["termination.rule=progressive"])
    assert uncensored(traces_of([[1.0]] * 3, probe=[False, True, False]), bounded).rollout_id.tolist() == [1]
    with pytest.raises(UserError, match="kept no probes"):
        uncensored(traces_of([[1.0]] * 2, trapped=[True, False]), random)


def some_run(tmp_path, steps=6, rollouts=30, seed=0):
    """A recorded run of rule none: half of the rollouts fall into a trap of KL 0.01."""
    rng = np.random.default_rng(seed)
    (tmp_path / "traces").mkdir(parents=True)
    for step in range(steps):
        rows = []
        for i in range(rollouts):
            d = rng.exponential(0.5, 60).astype(np.float32)
            trapped = i % 2 == 0
            d[30:] = 0.01 if trapped else d[30:]
            rows.append(
                TraceRow(
                    rollout_id=step * rollouts + i,
                    prompt_id="p",
                    step=step,
                    policy_version=step,
                    token_ids=np.arange(60, dtype=np.int32),
                    d=d,
                    stop_reason=StopReason.EOS,
                    cut=None,
                    confirmed=None,
                    threshold=None,
                    probe=False,
                    minimum=None,
                    would_cut=None,
                    correct=not trapped,
                )
            )
        write_traces(tmp_path / "traces", step, rows)
    config = Config.model_validate(
        {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c"},
         "termination": {"rule": "kat", "window": 8, "exempt": 4, "min_samples": 20, "min_steps": 1, "buffer": 60}}
    )  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    return tmp_path


def test_the_recommended_setting_stays_within_the_budget_for_the_fewest_tokens(tmp_path):
    traces, notes = load_traces(some_run(tmp_path))
    assert notes == () and len(traces.step) == 180
    base = rule_of(window=8, exempt=4, consecutive=4, min_samples=20, min_steps=1, buffer=60)
    results = sweep(traces, base, {"eta": [0.2, 0.5, 0.8], "window": [4, 8]}, FACTS)
    best, reason = recommend(results, 0.05)
    assert best.lost_bound <= 0.05 and best.generated_tokens < 0.9 and best.false_cut_share < 0.1
    assert all(best.generated_tokens <= r.generated_tokens for r in results if r.lost_bound <= 0.05)
    assert "fewest tokens" in reason and f"loses {best.lost_check:.1%}" in reason
    best, reason = recommend(results, 0.001)
    assert "no setting stays within 0.1%" in reason and best.lost_bound == min(r.lost_bound for r in results)
    with pytest.raises(UserError, match="no setting became active"):
        recommend(sweep(traces, base, {"min_steps": [100]}, FACTS), 0.1)
    front = frontier(results)
    assert [r.generated_tokens for r in front] == sorted(r.generated_tokens for r in front)
    assert [r.kept_kl for r in front] == sorted(r.kept_kl for r in front) and front


def test_what_the_choosing_half_loses_is_told_apart_from_the_other():
    """Rollouts 0 and 2 lose 3 of 4 and nothing, 1 and 3 nothing and 1 of 2."""
    rule = rule_of(window=1, consecutive=1)
    traces = traces_of([[1.0, 3.0], [1.0, 1.0], [2.0], [1.0, 1.0]])
    cut = np.array([1, -1, -1, 1])
    nothing = np.full(4, -1)
    figures = weigh(traces, rule, np.ones(4, dtype=bool), Replayed(cut, np.maximum(cut, -1), nothing, nothing))
    assert figures.lost_share == pytest.approx((0.75 + 0.5) / 4)
    assert figures.lost_bound == pytest.approx((0.75 + 0 + 1) / 3) and figures.lost_check == pytest.approx(0.25)


@pytest.mark.parametrize(("window", "consecutive", "stride", "exempt"), [(4, 2, 1, 0), (5, 3, 2, 3)])
def test_a_replay_s_thresholds_are_those_of_a_rule_with_a_budget(window, consecutive, stride, exempt):
    rule = rule_of(
        window=window, consecutive=consecutive, stride=stride, exempt=exempt, budget=0.15, buffer=60,
        min_samples=20, min_steps=1, probe_share=0.3,
    )  # fmt: skip
    rng, made = np.random.default_rng(4), make_rule(rule, FACTS)
    values, steps, expected, shares = [], [], [], []
    for step in range(14):
        made.start_step(step)
        finished, share = [], made.probe_share
        shares.append(share)
        for _ in range(40):
            row = rng.exponential(1.0, int(rng.integers(3, 40))).astype(np.float32)
            row[int(rng.integers(40)) :] *= 0.05
            probe = is_probe(FACTS.seed, len(values), rule.probe_share if share is None else share)
            tracker = made.begin(RolloutStart(len(values), probe))
            tracker.observe(NewTokens(row))
            finished.append(Finished(tracker.minimum, tracker.cut is not None, probe, evidence=tracker.evidence))
            values.append(row)
            steps.append(step)
            expected.append(made.threshold)
        made.end_step(finished)
    thresholds, replayed = calibrate(traces_of(values, steps=steps), rule, FACTS.seed)
    assert [None if math.isnan(t) else t for t in thresholds] == expected
    assert shares[-1] == 60 / 400, "the buffer is full: fewer probes renew it in time"
    assert len(set(expected)) > 4 and (replayed.cut >= 0).sum() > 10


def test_the_command_prints_a_table_and_leaves_a_plot(tmp_path, capsys):
    run = some_run(tmp_path / "run")
    assert cli.main(["replay", str(run), "eta=[0.3, 0.6]", "window=8", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "180 rollouts, 10,800 scored tokens" in text and "recommended: kat window=8" in text
    rows = list(csv.DictReader((tmp_path / "out" / "replay.csv").open()))
    assert [r["eta"] for r in rows] == ["0.3", "0.6"] and float(rows[0]["generated_tokens"]) < 1
    assert (tmp_path / "out" / "replay.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eta=2"], "eta = 2"), (["width=3"], "FIELD=VALUE"), (["eta"], "FIELD=VALUE"),
        (["eta=["], "not valid YAML"),
        (["min_samples=[1, 999]"], "min_samples"), (["window=true"], "window = true: must be a number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(tmp_path, capsys, arguments, message):
    run = some_run(tmp_path / "run", steps=1)
    assert cli.main(["replay", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_cut_off_in_the_middle_is_read_up_to_the_damage(tmp_path):
    run = some_run(tmp_path / "run", rollouts=40)  # three row groups of at most 16
    damaged = run / "traces" / "step-000003.parquet"
    whole = load_traces(run)[0]
    content, groups = damaged.read_bytes(), pq.read_metadata(damaged)
    ends = [groups.row_group(i).column(0).dictionary_page_offset or 0 for i in (2, 1)]  # where these begin
    counts = []
    for size in (len(content) - 10, *(end + 20 for end in ends)):
        damaged.write_bytes(content[:size])
        traces, notes = load_traces(run)
        (note,) = notes
        counts.append(int((traces.step == 3).sum()))
        assert f"step-000003.parquet is damaged or cut off: read {counts[-1]} of its 40 rollouts" in note
        before = traces.take(np.flatnonzero(traces.step == 3))
        expected = whole.take(np.flatnonzero(whole.step == 3)[: counts[-1]])
        assert np.array_equal(before.d, expected.d) and np.array_equal(before.offsets, expected.offsets)
    assert counts == [40, 32, 16]


def test_a_damaged_file_is_named_and_left_out(tmp_path, capsys):
    run = some_run(tmp_path / "run")
    damaged = run / "traces" / "step-000003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:500])
    traces, notes = load_traces(run)
    assert set(traces.step.tolist()) == {0, 1, 2, 4, 5}
    assert len(notes) == 1 and "step-000003.parquet is damaged" in notes[0]
    assert cli.main(["replay", str(run), "eta=0.3"]) == 0
    assert "warning: " in capsys.readouterr().out
    for file in (run / "traces").glob("*.parquet"):
        file.write_bytes(b"PAR1")
    assert cli.main(["replay", str(run)]) == 2
    assert "none of its 6 trace files can be read" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "no config.yaml in it" in capsys.readouterr().err


def test_other_rules_are_replayed_with_their_own_code():
    # Ten tokens each; overlap 0 from token 2 on: with decay 0.5 the weight is 0 from token 3 on.
    overlap = np.tile([1.0, 1.0, *[0.0] * 8], 3).astype(np.float16)
    traces = replace(traces_of([[1.0] * 10] * 3, steps=[0, 0, 1]), columns={"overlap": overlap})
    (prefix,) = sweep(traces, settings_from(rule="fixed_prefix"), {"n": [4]}, FACTS)
    assert (prefix.cut_share, prefix.kept_tokens, prefix.generated_tokens) == (1.0, 0.4, 0.5)
    pruned = follow(traces, settings_from(rule="prune_opd", decay=0.5), FACTS)
    assert pruned.cut.tolist() == [3] * 3 and pruned.confirmed.tolist() == [4] * 3
    bounded = follow(traces, settings_from(rule="progressive", start=6, end=20, steps=1), FACTS)
    assert bounded.cut.tolist() == [6, 6, -1], "the second step's budget is 20"


@pytest.mark.parametrize("rule", ["random", "repetition", "prune_opd", "fixed_prefix"])
def test_the_run_s_own_rule_gives_its_cuts_again(tmp_path, rule):
    rng = np.random.default_rng(1)
    own = settings_from(rule=rule, **{"fixed_prefix": {"n": 20}, "repetition": {"repeats": 2, "min_period": 3},
                                  "prune_opd": {"decay": 0.1, "start": 25}}.get(rule, {}))  # fmt: skip
    made = make_rule(own, FACTS)
    for step in range(3):
        made.start_step(step)
        rows, finished = [], []
        for i in range(step * 20, step * 20 + 20):
            probe, length = i % 5 == 0, int(rng.integers(5, 60))
            length = length if probe else min(length, made.budget or 60)
            new = NewTokens(
                rng.exponential(1, length).astype(np.float32), rng.integers(0, 3, length).astype(np.int32),
                overlap=rng.random(length).astype(np.float16),
            )  # fmt: skip
            tracker = made.begin(RolloutStart(i, probe))
            cut = tracker.observe(new)
            seen = cut.confirmed if cut and not probe else length
            full = seen == (made.budget or 60)
            finished.append(Finished(None, cut=bool(cut and not probe), probe=probe, length=seen, full=full))
            empty = np.zeros(length + 2, dtype=np.float32)
            features = TokenFeatures(new.token_ids, new.overlap, *[empty[:length]] * 4)
            features = TokenFeatures(**{k: v[:seen] for k, v in vars(features).items()})
            reason = StopReason.TRAPPED if cut and not probe else StopReason.MAX_TOKENS if full else StopReason.EOS
            rows.append(
                TraceRow(
                    i, "p", step, step, np.append(new.token_ids, [9, 9])[: seen + 2], new.d[:seen], reason,
                    cut.at if cut and not probe else None, seen if cut and not probe else None, None, probe, None,
                    cut.at if cut and probe else None, None, features=features,
                )
            )  # fmt: skip
        made.end_step(finished)
        (tmp_path / "traces").mkdir(exist_ok=True)
        write_traces(tmp_path / "traces", step, rows)
    traces, _ = load_traces(tmp_path, COLUMNS)
    assert set(COLUMNS) == set(traces.columns) and (traces.cut >= 0).sum() > 10
    again = reproduce(traces, own, FACTS).cut
    assert again.tolist() == np.where(traces.probe == 1, traces.would_cut, traces.cut).tolist()


def test_the_command_takes_any_rule(tmp_path, capsys):
    run = some_run(tmp_path / "run")
    assert cli.main(["replay", str(run), "--rule", "fixed_prefix", "n=[10, 30]", "--budget", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "recommended: fixed_prefix n=30" in text
    assert [r["n"] for r in csv.DictReader((run / "replay" / "replay.csv").open())] == ["10", "30"]
    assert cli.main(["replay", str(run), "--rule", "random", "--budget", "0.9"]) == 0
    for arguments, message in (
        (["--rule", "trap"], "--rule 'trap': must be one of kat"),
        (["--rule", "fixed_prefix", "eta=0.3"], "with one of probe_share, n"),
        (["--rule", "fixed_prefix", "n=0"], "override n=0: termination.n = 0: must be a whole number >= 1"),
        (["--rule", "length_matched"], "termination.run is missing: text"),
        (["--rule", "prune_opd"], "needs the overlap"),
        (["--rule", "kat_stages"], "must be one of kat, fixed_prefix"),
    ):
        assert cli.main(["replay", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
