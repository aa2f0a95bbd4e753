"""A run's report: stages by hand, what is counted is never sampled, odd runs still give a page."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_ray.cli import main as cli
from kat_ray.config.load import load_config
from kat_ray.models.inspect import load_tokenizer
from kat_ray.report import curves, rollout_figures
from kat_ray.report.answers import answers_of
from kat_ray.report.browser import choose
from kat_ray.report.page import embedded_json
from kat_ray.report.phases import lens_of, phase_means, phase_table, phases_of, teacher_tokens
from kat_ray.report.run_records import read_run
from kat_ray.report.style import figure, percent, plain, thousands
from kat_ray.rewards import child
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import StopReason
from tests.support.reports import APPLIED, OWN, RULE, STAGES, row, small_run, write_run


def test_stages_by_hand(tmp_path):
    records = read_run(small_run(tmp_path))
    phases = phases_of(records, records.config.termination, own=True)
    assert phases.rows.tolist() == [0, 1, 3], "the cut rollout was not seen to its end"
    assert phases.active.tolist() == [True, True, False] and phases.trapped.tolist() == [True, False, False]
    assert phases.stage.tolist() == [0] * 3 + [1] * 5 + [2] * 3 + [-1] * 12 + [-2] * 5
    table = {r.name: r for r in phase_table(records, phases)}
    assert {name: r.tokens for name, r in table.items()} == {"no trap": 12, "before": 3, "agreement": 5, "after": 3}
    assert table["before"].kl == 1.0 and table["agreement"].kl == pytest.approx(0.2) and table["after"].kl == 2.0
    assert table["before"].share == pytest.approx(3 / 23)
    # The features of rollout 0 are i / 10: 0, 0.1, 0.2 before the cut; the entropy gap is |2 x - x|.
    assert table["before"].features["overlap"] == pytest.approx(0.1, abs=1e-3)
    assert table["after"].features["entropy_gap"] == pytest.approx(0.9, abs=1e-3)
    assert phase_means(phases)["agreement"].tolist() == [pytest.approx(0.2)]
    assert teacher_tokens(records, phases, 4) == {name: [(5, 1.0)] for name in ("before", "agreement", "after")}


def test_a_run_without_features_has_stages_without_them(tmp_path):
    records = read_run(small_run(tmp_path, features=None))
    phases = phases_of(records, records.config.termination, own=True)
    assert all(v is None for r in phase_table(records, phases) for v in r.features.values())
    assert teacher_tokens(records, phases, 4) == {}


kinds = st.tuples(st.sampled_from(["eos", "max_tokens"]), st.sampled_from([True, False, None]), st.integers(0, 7))


@given(st.lists(kinds, min_size=1, max_size=60), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_sample_shows_every_kind(tmp_path_factory, rollouts, most):
    path = tmp_path_factory.mktemp("run")
    steps = [[] for _ in range(8)]
    for i, (stop, correct, step) in enumerate(rollouts):
        steps[step].append(row(i, [0.5] * 3, step=step, stop_reason=StopReason(stop), correct=correct))
    records = read_run(write_run(path / "run", steps))
    chosen = choose(records, most)
    assert len(set(chosen.tolist())) == len(chosen) == min(most, len(rollouts))
    last = int(records.traces.step.max()) + 1
    kind = [(s, c, int(4 * t / last)) for s, c, t in zip(
        *(records.per_rollout(name) for name in ("stop_reason", "correct", "step")), strict=True)]  # fmt: skip
    shown = {kind[i] for i in chosen}
    assert len(shown) == min(most, len(set(kind))), "each kind is there before any comes twice"
    assert choose(records, most).tolist() == chosen.tolist()


def test_text_of_a_rollout_cannot_leave_the_page():
    nasty = {"text": "</script><script>alert(1)</script><!-- \u2028"}
    text = embedded_json(nasty)
    assert "<" not in text and json.loads(text) == nasty


def test_the_page_stands_alone_and_counts_everything(tmp_path, capsys):
    run = small_run(tmp_path)
    assert cli.main(["report", str(run), "--rollouts", "2"]) == 0
    page = run / "report" / "report.html"
    html = page.read_text()
    assert str(page) in capsys.readouterr().out
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    for name in (
        "learning",
        "stops",
        "threshold",
        "health",
        "heatmap",
        "position",
        "onset",
        "stages",
        "teacher-tokens",
    ):
        assert f'id="{name}"' in html and (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))
    assert len(data["rollouts"]) == 2 and "2 of 4 rollouts" in html
    assert ">25%</b><span>rollouts ended by the rule" in html, "of all four, not of the two that are shown"
    whole = {r["id"]: r for r in page_data(run)}
    assert whole[0]["z"][:5] == [1.0, 0.75, 0.5, 0.25, 0.0] and whole[2]["cut"] == 3
    assert whole[0]["prompt"].startswith("start") and whole[0]["gold"] is not None


def page_data(run, *arguments):
    return whole_data(run, *arguments)["rollouts"]


def whole_data(run, *arguments):
    assert cli.main(["report", str(run), *arguments]) == 0
    html = (run / "report" / "report.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


def test_a_run_without_rule_probes_or_end_still_has_a_page(tmp_path):
    plain = dict(probe=False, threshold=None, minimum=None, features=None, correct=None)
    run = write_run(tmp_path / "run", [[row(i, [0.5] * 9, **plain) for i in range(3)]], ["termination.rule=none"])
    (run / "evaluations.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "kl/mean": 0.5}\n{"step": 2, "kl')
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report" / "report.html").read_text()
    assert "metrics.jsonl:2 is half a line" in html and "the rule was never active" in html


def test_a_run_without_a_teacher_has_a_page_and_nothing_to_replay(tmp_path, capsys):
    unscored = dict(probe=False, threshold=None, minimum=None, features=None, correct=True)
    ids = np.arange(9, dtype=np.int32) + 2
    alone = ["termination.rule=none", "objective.opd.weight=0", "objective.rl.weight=1", "rollout.top_p=1",
             "rollout.rollouts_per_prompt=3", "teacher=null"]  # fmt: skip
    run = write_run(tmp_path / "run", [[row(i, [], token_ids=ids, **unscored) for i in range(3)]], alone)
    (run / "metrics.jsonl").write_text('{"step": 1, "learner/loss": 0.1, "rl/loss": 0.1}\n')
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report" / "report.html").read_text()
    assert "from rewards alone, rule none" in html and "the run had no teacher" in html
    assert [len(r["ids"]) if "ids" in r else 9 for r in page_data(run)] == [9, 9, 9]
    for command, message in (
        (["replay", str(run)], "none of its tokens was scored"),
        (["report", str(run), "--gradients"], "--gradients: "),
    ):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert message in (said := capsys.readouterr().err) and "Traceback" not in said


def test_other_settings_divide_the_rollouts_of_any_run(tmp_path):
    plain = dict(probe=False, threshold=None, minimum=None)
    steps = [[row(10 * s + i, STAGES, step=s, **plain) for i in range(4)] for s in range(3)]
    run = write_run(tmp_path / "run", steps, ["termination.rule=none"])
    arguments = ["window=4", "consecutive=1", "exempt=0", "min_samples=4", "min_steps=1", "eta=0.2"]
    assert cli.main(["report", str(run), *arguments, "--out", str(tmp_path / "page")]) == 0
    assert "not the run&#39;s own" in (html := (tmp_path / "page" / "report.html").read_text())
    assert 'id="stages"' in html and not (run / "report").exists()


@pytest.mark.integration
def test_the_browser_shows_settings_applied_afterwards_beside_the_runs_own(tmp_path):
    # Each step has the minima 0 0 0 1 1 1: their 0.8 quantile is 1, and STAGES is below it from token 1 on.
    steps = [[row(10 * s + i, STAGES if i < 3 else [1.0] * 12, step=s, threshold=0.25) for i in range(6)]
             for s in range(3)]  # fmt: skip
    run = write_run(tmp_path / "run", steps, [*RULE, "termination.window=8", "termination.min_samples=1"])
    data = whole_data(run, *APPLIED)
    assert not data["own"] and data["window"] == 4
    shown = {r["id"]: r for r in data["rollouts"]}
    assert shown[0]["seen_threshold"] is None and shown[0]["seen_cut"] is None, "inactive in step 0"
    assert shown[10]["seen_threshold"] == 1.0 and shown[10]["seen_cut"] == 1 and shown[13]["seen_cut"] is None
    assert {r["threshold"] for r in shown.values()} == {0.25}, "the run's own stays what it was"
    html = (run / "report" / "report.html").read_text()
    assert "marks called applied" in html and "mean KL of the last 4 tokens" in html
    own = whole_data(small_run(tmp_path / "own"))
    assert own["own"] and [r["seen_threshold"] for r in own["rollouts"]] == [0.5, 0.5, 0.5, None]
    assert [r["seen_cut"] for r in own["rollouts"]] == [3, None, 3, None]


def test_a_step_that_feeds_no_calibration_has_the_threshold_of_the_next(tmp_path):
    cut = dict(probe=False, stop_reason=StopReason.TRAPPED, cut=3, confirmed=8, correct=None)
    steps = [[row(i, [1.0] * 6) for i in range(4)], [row(10, STAGES[:8], step=1, **cut)], [row(20, STAGES, step=2)]]
    steps.append([row(30, STAGES[:8], step=3, **cut)])
    records = read_run(write_run(tmp_path / "run", steps))
    rule = KatSettings(window=4, consecutive=2, exempt=0, min_samples=4, min_steps=1, eta=0.2, buffer=8)
    lens = lens_of(records, rule, False, phases_of(records, rule, own=False))
    assert lens.thresholds[:4].tolist() == [pytest.approx(math.nan, nan_ok=True)] * 4
    # z of STAGES[:8] is 1, 3/4, 1/2, ...: two below 1 from the window that starts at token 1.
    assert lens.thresholds[4:6].tolist() == [1.0, 1.0] and lens.cut[4] == 1
    assert math.isnan(lens.thresholds[6]), "after the last probe it is not known"


def test_answers_are_read_from_what_was_kept(tmp_path):
    tokenizer = load_tokenizer(load_config("demo", []).student)
    ids = np.array(tokenizer("answer 12\nanswer 34")["input_ids"], np.int32)
    assert len(ids) == 5
    cut = dict(probe=False, stop_reason=StopReason.TRAPPED, cut=3, confirmed=4, correct=None, token_ids=ids)
    rows = [row(0, [0.5] * 5, **cut), row(1, [0.5] * 5, token_ids=ids), row(2, [0.5] * 5, **(cut | {"cut": 0}))]
    assert [r["answer"] for r in page_data(write_run(tmp_path / "run", [rows]))] == ["12", "34", None]


def test_mathematical_answers(monkeypatch):
    pytest.importorskip("math_verify")
    texts = ["so it is $\\boxed{\\frac{1}{2}}$", "no answer", r"\boxed{9^{9^{9^9}}}", "I think 7"]
    half, none, _, seven = answers_of(texts, "math")
    assert "frac{1}{2}" in half and none is None and seven == "7"
    monkeypatch.setattr(child.sys, "executable", "false")  # a child that says nothing, as without the package
    assert answers_of(["", " so 7 ", "x" * 100], "math") == [None, "so 7", "…" + "x" * 60]


def test_heat_map_shows_cuts_in_order(tmp_path):
    records = read_run(small_run(tmp_path))
    lens = lens_of(records, records.config.termination, True, None)
    fig = rollout_figures.heat_map(records, lens)
    (axes,) = [a for a in fig.axes if a.get_xlabel() == "token"]
    assert axes.get_title(loc="left") == "The run's only step"
    marks = {m.get_label(): m.get_offsets().tolist() for m in axes.collections}
    # Both with a mark at token 3 first, the probe above or below; then 5 and 12 tokens.
    assert sorted(marks["cut"] + marks["probe: would be cut"]) == [[3, 0], [3, 1]]
    image = axes.images[0].get_array()
    assert (~np.ma.getmaskarray(image)).sum(axis=1)[2:].tolist() == [5, 12]
    assert axes.get_xlim()[1] == int(np.percentile([11, 12, 8, 5], 95)) - 0.5


@pytest.mark.parametrize(
    ("steps", "titles"),
    [
        (1, ["The run's only step"]),
        (2, ["First step", "Last step"]),
        (3, ["First step", "Last step"]),
        (4, ["First quarter of the run", "Last quarter"]),
        (9, ["First quarter of the run", "Last quarter"]),
    ],
)
def test_both_ends_of_a_run_have_rollouts(steps, titles):
    ends = rollout_figures.ends_of(np.repeat(np.arange(steps), 3))
    assert [title for title, _ in ends] == titles and all(mask.sum() >= 3 for _, mask in ends)
    assert ends[0][1][0] and ends[-1][1][-1]
    assert rollout_figures.ends_of(np.zeros(0, np.int32)) == []


def test_ticks_say_what_they_are():
    _, ((axes,),) = figure(1, 1)
    percent(axes.yaxis)
    plain(axes.xaxis)
    share, nats = axes.yaxis.get_major_formatter(), axes.xaxis.get_minor_formatter()
    assert [share(v, 0) for v in (0, 0.025, 0.07, 0.075, 1)] == ["0%", "2.5%", "7%", "7.5%", "100%"]
    assert [nats(v, 0) for v in (0.02, 0.03, 0.5, 4)] == ["0.02", "", "0.5", ""]
    thousands(axes.xaxis)
    tokens = axes.xaxis.get_major_formatter()
    figures = [tokens(v, 0) for v in (0, 0.5, 100, 2500, 3e5, 2e6, 1.5e9)]
    assert figures == ["0", "0.5", "100", "2.5k", "300k", "2M", "1.5B"]


def test_pass_at_k_of_fewer_answers_is_not_drawn_with_that_of_more(tmp_path):
    run = small_run(tmp_path)
    ks = {0: 3, 5: 1, 10: 3}
    steps = [{"step": step, "eval/avg_at_k": 0.5, "eval/pass_at_k": 0.3 * k} for step, k in ks.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    evaluations = [{"step": step, "k": k} for step, k in ks.items()]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    accuracy = curves.learning(read_run(run)).axes[1]
    drawn = {line.get_label(): line.get_xdata().tolist() for line in accuracy.lines}
    assert drawn == {"pass@k": [0, 10], "avg@k": [0, 5, 10]}


def test_failed_rollouts_and_the_entropy_gap_are_drawn(tmp_path):
    run = small_run(tmp_path)
    line = {"rollout/eos_share": 0.5, "rollout/max_tokens_share": 0.25, "rollout/trapped_share": 0.0}
    lines = [line | {"step": 1, "rollout/failed": 1, "health/student_entropy": 0.5, "health/teacher_entropy": 0.75}]
    lines.append(line | {"step": 2, "rollout/max_tokens_share": 0.5, "rollout/failed": 0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_run(run)
    steps, shares = curves.stop_shares(records)
    assert steps == [1, 2] and shares["failed"] == [0.25, 0.0]
    assert curves.entropy_gap(records) == ([1], [-0.25])
    assert [t.get_text() for t in curves.stops(records).axes[0].get_legend().get_texts()][-1] == "failed"
    run_without = read_run(small_run(tmp_path / "b"))
    assert "failed" not in curves.stop_shares(run_without)[1]


def test_each_teacher_has_a_threshold_of_its_own(tmp_path):
    """Two calibrations, in the run and applied afterwards; the page can be made of both."""
    rows = [[row(4 * step + i, STAGES, step=step, teacher="ab"[i % 2], threshold=0.5 + i % 2) for i in range(4)]
            for step in range(3)]  # fmt: skip
    path = write_run(tmp_path / "run", rows)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        del line["kat/threshold"]
        line |= {"teacher/threshold/a": 0.5, "teacher/threshold/b": 1.5}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_run(path)
    settings = records.config.termination
    phases = phases_of(records, settings, True)
    (axes,) = curves.threshold(records, phases, lens_of(records, settings, True, phases)).axes
    drawn = {line.get_label(): set(line.get_ydata()) for line in axes.lines}
    assert drawn["threshold: a"] == {0.5} and drawn["threshold: b"] == {1.5} and "threshold" not in drawn
    other = settings.model_copy(update={"eta": 0.9, "min_samples": 1, "min_steps": 1})
    phases = phases_of(records, other, False)
    lens = lens_of(records, other, False, phases)
    assert np.isnan(lens.thresholds[records.traces.step == 0]).all()
    assert not np.isnan(lens.thresholds[records.traces.step == 2]).any()
    (axes,) = curves.threshold(records, phases, lens).axes
    assert {"threshold, applied afterwards: a", "threshold, applied afterwards: b"} <= {
        line.get_label() for line in axes.lines
    }  # fmt: skip


def test_the_threshold_stands_beside_minima_that_no_cut_hid(tmp_path):
    records = read_run(small_run(tmp_path))
    rule = records.config.termination
    phases = phases_of(records, rule, own=True)
    (axes,) = curves.threshold(records, phases, lens_of(records, rule, True, phases)).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mean m(y), seen to the end"].get_ydata().tolist() == [pytest.approx((0 + 1 + 1) / 3)]
    assert lines["mean m(y), seen to the end"].get_xdata().tolist() == [1], "steps as in metrics.jsonl"
    lens = lens_of(records, rule.model_copy(update={"eta": 0.5}), False, phases)
    (axes,) = curves.threshold(records, phases, lens).axes
    assert "threshold, applied afterwards" in [line.get_label() for line in axes.lines]


def with_mark(mark, *rule):
    """The pages of rules are much alike: some are made in each tier."""
    return pytest.param([*rule], marks=mark)


RULES = [
    ["termination.rule=none"],
    with_mark(pytest.mark.integration, *OWN, "termination.rule=kat_stages"),
    with_mark(pytest.mark.integration, "termination.rule=prune_opd"),
    with_mark(pytest.mark.integration, "termination.rule=progressive", "termination.start=16"),
    with_mark(pytest.mark.nightly, "termination.rule=length_matched", "termination.run=runs/kat"),
    with_mark(pytest.mark.nightly, "termination.rule=repetition"),
    with_mark(pytest.mark.nightly, "termination.rule=random"),
    with_mark(pytest.mark.nightly, "termination.rule=fixed_prefix", "termination.n=8"),
    with_mark(pytest.mark.integration, *OWN, "run.trace_features=false"),
]


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
def test_every_rule_has_a_page(tmp_path, rule):
    own = any("kat" in part and "rule" in part for part in rule) or "run.trace_features=false" in rule
    cuts = any(name in rule[0] for name in ("prune", "length", "repetition", "random", "fixed"))
    bounded = any(name in rule[0] for name in ("prune", "progressive"))
    weighs = any(name in part for part in rule for name in ("prune", "kat_stages"))
    rows = []
    for i in range(48):
        probe = i % 4 == 0
        changes = dict(probe=probe, threshold=0.5 if own else None, minimum=0.0 if own else None, step=i // 12)
        if cuts and i % 2 and not probe:
            changes |= dict(stop_reason=StopReason.TRAPPED, cut=3, confirmed=8, correct=None)
        elif bounded and not probe:
            changes |= dict(stop_reason=StopReason.MAX_TOKENS, correct=None)
        if weighs and not probe:
            changes |= dict(weights=np.array([1.0] * 3 + [0.5] * 2 + [0.0] * 6, np.float32))
        changes |= dict(features=None) if "run.trace_features=false" in rule else {}
        rows.append(
            row(i, STAGES if i % 3 else [1.0] * 11, would_cut=3 if own and probe and i % 3 else None, **changes)
        )
    run = write_run(tmp_path / "run", [rows[i : i + 12] for i in range(0, 48, 12)], rule)
    settings = [] if own else ["window=4", "consecutive=2", "exempt=0", "min_samples=2", "min_steps=1", "eta=0.3"]
    data = whole_data(run, *settings)
    assert data["own"] is own and len(data["rollouts"]) == 48
    active = [r for r in data["rollouts"] if r["seen_threshold"] is not None]
    assert active and any(r["seen_cut"] is not None for r in active)
    assert {tuple(r["weights"] or ()) for r in data["rollouts"]} >= (
        {(1.0,) * 3 + (0.5,) * 2 + (0.0,) * 6} if weighs else {()}
    )
    html = (run / "report" / "report.html").read_text()
    assert 'id="stages"' in html and ("marks called applied" in html) is not own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["window=0"], "window"),
        (["windw=4"], "must be FIELD=VALUE"),
        (["window=[4,8]"], "single value"),
        (["--gradients"], "holds no checkpoint"),
        (["--gradients", "a"], "no directory or two"),
    ],
)
def test_mistakes_are_one_message(tmp_path, capsys, arguments, message):
    run = small_run(tmp_path)
    assert cli.main(["report", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no config.yaml in it" in capsys.readouterr().err


def test_a_summary_that_is_cut_off_is_named(tmp_path, capsys):
    run = small_run(tmp_path)
    (run / "summary.json").write_text('{"steps": 1, "kept')
    assert cli.main(["report", str(run)]) == 2
    assert f"error: {run / 'summary.json'}: is damaged" in capsys.readouterr().err
