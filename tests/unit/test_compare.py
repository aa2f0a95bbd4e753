"""A comparison: same start, same prompts, only the rule differs; paired differences; goes on where it was."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from kat_ray import cli
from kat_ray.compare import (
    Result,
    config_of,
    differences,
    order_of,
    paired_difference,
    parse_arm,
    read_results,
    read_runs,
    run_all,
    table,
    tflop,
    write_results,
)
from kat_ray.config_io import load_config, save_config
from kat_ray.errors import UserError

BASE = load_config("demo", ["run.steps=3"])
SUMMARY = {
    "rollouts_started": 10, "kept_tokens": 300, "generated_tokens": 400, "scored_tokens": 390,
    "trained_tokens": 300, "overshoot_tokens": 20, "prompt_tokens": 100, "wall_seconds": 12.0,
    "parameters": {"student": 1000, "teacher": 2000},
}  # fmt: skip


def finish(config, right):
    """What a run leaves, as far as a comparison reads it."""
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    k = config.evaluation.k
    evaluation = {"avg_at_k": float(np.mean(right)) / k, "pass_at_k": float(np.mean(np.array(right) > 0)), "k": k}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"eval_after": evaluation}))
    lines = [{"k": k, "right": [0] * len(right)}, {"k": k, "right": right}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_config(config, folder / "config.yaml")


def test_arms_are_rules_with_fields():
    arm = parse_arm("kat:eta=0.5,window=32")
    assert (arm.label, arm.rule, arm.fields) == ("kat-eta=0.5-window=32", "kat", {"eta": 0.5, "window": 32})
    for text, message in (
        ("kta", "is no rule"),
        ("kat:et=1", "must be FIELD=VALUE"),
        ("kat:eta", "must be FIELD=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            parse_arm(text)


def test_runs_differ_in_the_rule_and_nothing_else(tmp_path):
    kat = config_of(BASE, parse_arm("kat"), 7, tmp_path)
    assert kat.termination == BASE.termination and kat.run.seed == 7
    other = config_of(BASE, parse_arm("kat:eta=0.5"), 7, tmp_path)
    assert [d.split(":")[0] for d in differences(other, kat)] == ["run.dir", "termination.eta"]
    copy = config_of(BASE, parse_arm("length_matched"), 7, tmp_path)
    assert copy.termination.run == str(tmp_path / "kat" / "seed-7")
    assert copy.termination.probe_share == BASE.termination.probe_share
    with pytest.raises(UserError, match="eta"):
        config_of(BASE, parse_arm("kat:eta=2"), 0, tmp_path)


def test_length_matched_comes_after_the_run_it_copies():
    arms = [parse_arm(a) for a in ("length_matched", "none", "kat")]
    assert [a.rule for a in order_of(arms)] == ["none", "kat", "length_matched"]
    with pytest.raises(UserError, match="add kat"):
        order_of(arms[:2])
    with pytest.raises(UserError, match="twice"):
        order_of([arms[1], arms[1]])


def test_a_comparison_goes_on_where_it_was(tmp_path):
    arms, done, said = [parse_arm("none"), parse_arm("kat")], [], []

    def train(config):
        done.append((config.termination.rule, config.run.seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        finish(config, [1, 2])

    with pytest.raises(KeyboardInterrupt):
        run_all(BASE, arms, [0, 1], tmp_path, train, said.append)
    run_all(BASE, arms, [0, 1], tmp_path, train, said.append)
    assert done == [("none", 0), ("kat", 0), ("none", 1), ("none", 1), ("kat", 1)]
    assert said[-4].endswith("none, seed 0: done before")
    changed = BASE.model_copy(update={"learner": BASE.learner.model_copy(update={"lr": 9e-4})})
    with pytest.raises(UserError, match=r"other settings \(learner.lr: 0.0009, was 0.001\)"):
        run_all(changed, arms, [0, 1], tmp_path, train, said.append)


def result(label, right):
    return Result(label, (0, 1, 2), (), {}, np.array(right, dtype=float))


def test_differences_are_paired_by_seed_and_problem():
    rng = np.random.default_rng(0)
    hard = rng.random((3, 200))  # problems differ much more than rules do
    mean, low, high = paired_difference(result("a", hard + 0.05), result("b", hard))
    assert mean == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)
    noise = rng.normal(0, 0.3, (3, 200))
    mean, low, high = paired_difference(result("a", hard + noise), result("b", hard))
    assert low < 0 < high and low < mean < high
    width = 2 * 1.96 * 0.3 / np.sqrt(600)  # of a mean of independent differences; never narrower, sqrt(3) at most
    assert 0.9 * width < high - low < 1.1 * np.sqrt(3) * width
    assert paired_difference(result("a", hard + noise), result("b", hard)) == (mean, low, high)


def test_arithmetic_by_hand():
    # Student 1000: 2 x (100 + 400) + 6 x (100 + 300) = 3400 per parameter; teacher 2000: 2 x (100 + 390) = 980.
    assert tflop(SUMMARY) == pytest.approx(1e-12 * (1000 * 3400 + 2000 * 980))


def test_the_table_is_saved_in_three_forms(tmp_path):
    arms = [parse_arm("none"), parse_arm("kat")]
    for seed in (0, 1):
        finish(config_of(BASE, arms[0], seed, tmp_path), [3, 0, 0, 3])
        finish(config_of(BASE, arms[1], seed, tmp_path), [3, 3, 0, 3])
    results = read_results(arms, [0, 1], tmp_path)
    heading, rows = table(results)
    assert heading[:2] == ["rule", "avg@k"] and heading[-1] == "avg@k - none [95 %]"
    assert rows[0][:3] == ["none", "50.0% ± 0.0%", "50.0% ± 0.0%"] and rows[0][-1] == ""
    assert rows[1][1] == "75.0% ± 0.0%" and rows[1][-1].startswith("+25.0% [+0.0%")
    markdown, table_csv, document = write_results(results, tmp_path)
    assert markdown.read_text().splitlines()[3].startswith("| kat | 75.0% ± 0.0% |")
    lines = list(csv.DictReader(table_csv.open()))
    assert [(r["rule"], r["seed"]) for r in lines] == [("none", "0"), ("none", "1"), ("kat", "0"), ("kat", "1")]
    assert lines[0]["mean_length"] == "30.0"
    assert json.loads(document.read_text())["kat"]["avg_at_k_minus"]["none"]["mean"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "none", "kta"], "is no rule"),
        (["--rules", "none", "--seeds", "1", "1"], "same seed"),
        (["--rules", "none", "evaluation.data=null"], "evaluation.data = null"),
        (["--rules", "length_matched"], "add kat"),
    ],
)
def test_mistakes_are_one_message(capsys, arguments, message):
    assert cli.main(["compare", "demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_finished_runs_are_compared_and_their_other_differences_named(tmp_path, capsys):
    for rule, seed, right in (("none", 0, [3, 0]), ("none", 1, [0, 0]), ("kat", 0, [3, 3]), ("kat", 1, [3, 0])):
        finish(config_of(BASE, parse_arm(rule), seed, tmp_path), right)
    hot = config_of(BASE.model_copy(update={"learner": BASE.learner.model_copy(update={"lr": 9e-4})}),
                    parse_arm("kat:eta=0.5"), 0, tmp_path)  # fmt: skip
    finish(hot, [3, 3])
    again = hot.model_copy(update={"run": hot.run.model_copy(update={"name": "again", "steps": 4})})
    finish(again, [0, 0])
    runs = [tmp_path / rule / f"seed-{seed}" for rule in ("none", "kat") for seed in (0, 1)]
    results, notes = read_runs(runs)
    assert [(r.label, r.seeds) for r in results] == [("none", (0, 1)), ("kat", (0, 1))] and not notes
    runs += [Path(hot.run.dir) / "seed-0", Path(hot.run.dir) / "again"]
    results, notes = read_runs(runs)
    assert [r.label for r in results][1:3] == ["kat-eta=0.3", "kat-eta=0.5"]
    assert results[3].label.endswith("again)"), "same rule and seed: it differs in something else"
    assert "more than the rule: learner.lr: 0.0009, was 0.001" in notes[0] and "4 steps" in notes[-1]
    assert cli.main(["compare", "--runs", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    assert "note: " in (out := capsys.readouterr().out) and "compare.html" in out
    html = (tmp_path / "page" / "compare.html").read_text()
    assert "more than the rule: learner.lr" in html and 'id="differences"' in html
    assert (tmp_path / "page" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "page" / "compare.json").read_text())
    assert document["kat-eta=0.3"]["avg_at_k_minus"]["none"]["mean"] == pytest.approx(0.5)
    assert document["kat-eta=0.5"]["avg_at_k_minus"] == {}, "one seed is not paired with two"


def test_runs_that_cannot_be_compared_are_named(tmp_path, capsys):
    finish(config_of(BASE, parse_arm("none"), 0, tmp_path), [3, 0])
    done = str(tmp_path / "none" / "seed-0")
    (tmp_path / "open").mkdir()
    save_config(BASE, tmp_path / "open" / "config.yaml")
    for arguments, message in (
        (["--runs", str(tmp_path)], "no config.yaml"),
        (["--runs", done, str(tmp_path / "open")], "its run has not ended"),
        (["demo", "--runs", done], "leave 'demo' out"),
        ([], "name a configuration file"),
    ):
        assert cli.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
