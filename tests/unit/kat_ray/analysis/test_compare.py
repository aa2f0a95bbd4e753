"""A comparison: same start, same prompts, only the rule differs; paired differences; goes on where it was."""

import csv
import json
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kat_ray.analysis.bootstrap import bootstrap
from kat_ray.analysis.compare import check_same, config_of, differences, order_of, parse_arm, plan_runs, run_all
from kat_ray.analysis.compare_results import read_results, tflop_parts
from kat_ray.analysis.compare_table import Compared, difference_table, paired, table, write_results
from kat_ray.cli import main as cli
from kat_ray.config import LoraConfig, PolicyObjective
from kat_ray.config.load import load_config, save_config
from kat_ray.errors import UserError
from tests.support.comparisons import BASE, SUMMARY, changed, finish, finish_rule


def test_arms_are_rules_with_fields():
    arm = parse_arm("kat:eta=0.5,window=32")
    assert (arm.label, arm.rule, arm.fields) == ("kat-eta=0.5-window=32", "kat", {"eta": 0.5, "window": 32})
    for text, message in (
        ("kta", "is not a rule"),
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
    copy = config_of(BASE, parse_arm("length_matched:of=kat"), 7, tmp_path)
    assert copy.termination.run == str(tmp_path / "kat" / "seed-7")
    assert copy.termination.probe_share == BASE.termination.probe_share
    with pytest.raises(UserError, match="eta"):
        config_of(BASE, parse_arm("kat:eta=2"), 0, tmp_path)
    with pytest.raises(UserError, match="--rules kat-window=True: window = true: must be a number"):
        config_of(BASE, parse_arm("kat:window=true"), 0, tmp_path)


def test_length_matched_comes_after_the_run_it_copies(tmp_path):
    arms = [parse_arm(a) for a in ("length_matched", "none", "kat:eta=0.5")]
    assert [a.rule for a in order_of(arms)] == ["none", "kat", "length_matched"]
    copy = order_of(arms)[-1]
    assert (copy.label, copy.of) == ("length_matched", "kat-eta=0.5"), "the only KAT arm"
    assert config_of(BASE, copy, 7, tmp_path).termination.run == str(tmp_path / "kat-eta=0.5" / "seed-7")
    with pytest.raises(UserError, match="add kat"):
        order_of(arms[:2])
    with pytest.raises(UserError, match="twice"):
        order_of([arms[1], arms[1]])


def test_length_matched_copies_the_arm_that_is_named(tmp_path):
    kats = [parse_arm("kat"), parse_arm("kat:eta=0.5")]
    with pytest.raises(UserError, match="which one"):
        order_of([*kats, parse_arm("length_matched")])
    copy = parse_arm("length_matched:of=kat-eta=0.5,probe_share=0.2")
    assert (copy.label, copy.of) == ("length_matched-probe_share=0.2-of=kat-eta=0.5", "kat-eta=0.5")
    config = config_of(BASE, order_of([copy, *kats])[-1], 1, tmp_path)
    assert config.termination.run == str(tmp_path / "kat-eta=0.5" / "seed-1")
    assert config.termination.probe_share == 0.2
    for text, message in (
        ("length_matched:of=kat-eta=0.7", "no rule has the label"),
        ("length_matched:of=none", "has no cuts"),
        ("length_matched:of=kat,run=x", "leave one out"),
    ):
        with pytest.raises(UserError, match=message):
            order_of([*kats, parse_arm("none"), parse_arm(text)])


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    arms, done, said = [parse_arm("none"), parse_arm("kat")], [], []

    def train(config):
        done.append((config.termination.rule, config.run.seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        finish(config, [1, 2])

    with pytest.raises(KeyboardInterrupt):
        run_all(plan_runs(BASE, arms, [0, 1], tmp_path), train, said.append)
    run_all(plan_runs(BASE, arms, [0, 1], tmp_path), train, said.append)
    assert done == [("none", 0), ("kat", 0), ("none", 1), ("none", 1), ("kat", 1)]
    assert said[-4].endswith("none, seed 0: already done")
    with pytest.raises(UserError, match=r"different settings \(learner.lr: 0.0009, was 0.001\)"):
        plan_runs(changed(BASE, "learner", lr=9e-4), arms, [0, 1], tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    again = plan_runs(BASE, arms, [0, 1], Path(tmp_path.name))
    assert all(run.done for run in again), "the same folder, written otherwise"


def test_a_folder_written_otherwise_is_the_same_for_a_copy_too(tmp_path, monkeypatch):
    arms = [parse_arm("kat"), parse_arm("length_matched")]
    run_all(plan_runs(BASE, arms, [0], tmp_path), lambda config: finish(config, [1]), lambda text: None)
    monkeypatch.chdir(tmp_path.parent)
    assert all(run.done for run in plan_runs(BASE, arms, [0], Path(tmp_path.name)))
    (tmp_path / "kat").rename(tmp_path / "other")
    with pytest.raises(UserError, match="termination"):
        plan_runs(BASE, [parse_arm(f"length_matched:run={tmp_path}/x")], [0], tmp_path)


def test_every_run_is_checked_before_the_first_starts(tmp_path):
    arms = [parse_arm("none"), parse_arm(f"length_matched:run={tmp_path}/nothing")]
    with pytest.raises(UserError, match=r"--rules length_matched-run.*no traces in it"):
        plan_runs(BASE, arms, [0, 1], tmp_path)


def test_differences_hold_their_interval():
    rng = np.random.default_rng(0)
    assert bootstrap(np.full((3, 200), 0.05)) == pytest.approx((0.05, 0.05, 0.05))
    noise = rng.normal(0, 0.3, (3, 200))
    mean, low, high = bootstrap(noise)
    assert low < 0 < high and low < mean < high
    width = 2 * 1.96 * 0.3 / np.sqrt(600)  # of a mean of independent differences; never narrower, sqrt(3) at most
    assert 0.9 * width < high - low < 1.1 * np.sqrt(3) * width
    assert bootstrap(noise) == (mean, low, high)
    one_seed = bootstrap(noise[:1])  # problems only
    assert one_seed.high - one_seed.low == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(200), rel=0.15)


def test_differences_are_paired_by_seed_and_problem(tmp_path):
    # Every problem is answered as well as by `none`, but for one more right answer to the second.
    for seed, hard in ((0, [3, 0, 1, 0]), (1, [0, 0, 3, 3])):
        finish_rule(tmp_path, "none", seed, hard)
        kat = {"kept_tokens": (150, 210)[seed], "generated_tokens": 200}
        finish_rule(tmp_path, "kat", seed, [hard[0], 1, *hard[2:]], **kat)
    (pair,) = paired(read_results([parse_arm("none"), parse_arm("kat")], [0, 1], tmp_path))
    assert (pair.result.label, pair.baseline.label, pair.seeds) == ("kat", "none", (0, 1))
    assert pair.differences["avg_at_k"].mean == pytest.approx(1 / 3 / 4)
    assert pair.differences["pass_at_k"].mean == pytest.approx(1 / 4)
    assert pair.differences["pass_at_k"].low == 0 < pair.differences["pass_at_k"].high
    # Tokens by seed: -50 %, -30 %. No interval: the extremes.
    assert pair.differences["mean_length"] == pytest.approx((-0.4, -0.5, -0.3))
    assert pair.differences["generated_tokens"] == pytest.approx((-0.5, -0.5, -0.5))
    # none: 2 x 500 + 6 x 400 student, 2 x 490 teacher, as below; kat: 2 x 300 + 6 x 250 and 6 x 310.
    whole, parts = 3400e3 + 1960e3, [600e3 + 1500e3 + 1960e3, 600e3 + 1860e3 + 1960e3]
    first, second = (p / whole - 1 for p in parts)
    assert pair.differences["tflop"] == pytest.approx(((first + second) / 2, first, second))
    heading, rows = difference_table([pair])
    assert heading[:3] == ["rule", "against", "seeds"] and rows[0][:3] == ["kat", "none", "0, 1"]
    assert rows[0][heading.index("kept tokens / rollout")] == "-40.0% [-50.0%, -30.0%]"


def test_baselines_are_known_by_their_rule(tmp_path):
    for rule in ("none", "kat", "length_matched:run=x"):
        finish_rule(tmp_path, rule, 0, [1, 0])
    arms = [parse_arm(rule) for rule in ("none", "kat", "length_matched:run=x")]
    pairs = [(p.result.label, p.baseline.label) for p in paired(read_results(arms, [0], tmp_path))]
    copy = "length_matched-run=x"
    assert pairs == [("kat", "none"), (copy, "none"), ("kat", copy)]


def test_arithmetic_by_hand():
    # Student 1000: 2 x (100 + 400) sampling and 6 x (100 + 300) learning; teacher 2000: 2 x (100 + 390). The
    # learner runs all 300 kept tokens, also the 10 of weight 0 that are not trained on.
    parts = tflop_parts(SUMMARY, Path("s"), BASE)
    assert parts == pytest.approx(
        {"tflop_sampling": 1e-9 * 1000, "tflop_scoring": 2e-9 * 980, "tflop_learning": 1e-9 * 2400}
    )
    adapters = tflop_parts(SUMMARY, Path("s"), changed(BASE, "learner", lora=LoraConfig()))
    assert adapters["tflop_learning"] == pytest.approx(1e-9 * 1600), "no gradients of the weights"
    alone = SUMMARY | {"parameters": {"student": 1000}, "scored_tokens": 0}
    assert tflop_parts(alone, Path("s"), BASE) == parts | {"tflop_scoring": 0.0}, "a run without a teacher"
    sizes, given = {"student": 500, "teacher": 1000, "teachers.math": 3000}, {"teacher": 80, "teachers.math": 900}
    several = tflop_parts(SUMMARY | {"parameters": sizes, "teacher_tokens": given}, Path("s"), BASE)
    assert several["tflop_scoring"] == pytest.approx(2e-12 * (1000 * 80 + 3000 * 900))
    with pytest.raises(UserError, match=r"s: parameters .* are None and 2000"):
        tflop_parts(SUMMARY | {"parameters": {"student": None, "teacher": 2000}}, Path("s"), BASE)


@pytest.mark.parametrize(
    ("rl", "factor"),
    [
        ({"weight": 1.0}, 6), ({"weight": 1.0, "loss": "gspo"}, 8), ({"weight": 0.0, "loss": "gspo"}, 6),
        ({"weight": 1.0, "loss": "reinforce", "correction": "sequence_mask"}, 8),
        ({"weight": 1.0, "loss": "reinforce", "correction": "truncate"}, 6),
    ],
)  # fmt: skip
def test_with_rewards_what_is_learnt_goes_on_to_the_confirmation_and_some_losses_look_twice(rl, factor):
    config = changed(BASE, "objective", rl=PolicyObjective(**rl))
    parts = tflop_parts(SUMMARY | {"learnt_tokens": 320}, Path("s"), config)
    assert parts["tflop_learning"] == pytest.approx(factor * 1e-9 * (100 + 320))


def test_the_table_is_saved_in_three_forms(tmp_path):
    arms = [parse_arm("none"), parse_arm("kat")]
    for seed in (0, 1):
        finish_rule(tmp_path, "none", seed, [3, 0, 0, 3])
        finish_rule(tmp_path, "kat", seed, [3, 3, 0, 3])
    results = read_results(arms, [0, 1], tmp_path)
    heading, rows = table(results)
    assert heading[:2] == ["rule", "avg@k"] and heading[-1] == "training seconds"
    assert rows[0][:3] == ["none", "50.0% ± 0.0%", "50.0% ± 0.0%"] and rows[0][-1] == "4 ± 0"
    assert rows[1][1] == "75.0% ± 0.0%"
    markdown, table_csv, document = write_results(Compared.of(results, ["something differs"]), tmp_path)
    text = markdown.read_text()
    assert text.splitlines()[3].startswith("| kat | 75.0% ± 0.0% |")
    assert "| kat | none | 0, 1 | +25.0% [+0.0%" in text and "k = 3" in text and "- Note: something differs" in text
    assert "learning: prompts and kept tokens" in text and "resamples seeds and problems" in text
    lines = list(csv.DictReader(table_csv.open()))
    assert [(r["rule"], r["seed"]) for r in lines] == [("none", "0"), ("none", "1"), ("kat", "0"), ("kat", "1")]
    assert lines[0]["mean_length"] == "30.0" and lines[0]["wall_seconds"] == "12.0"
    assert lines[0]["training_seconds"] == "4.5"
    parts = [float(lines[0][f"tflop_{name}"]) for name in ("sampling", "scoring", "learning")]
    assert sum(parts) == pytest.approx(float(lines[0]["tflop"])) and min(parts) > 0
    saved = json.loads(document.read_text())
    assert saved["rules"]["kat"]["tflop_learning"] == pytest.approx([2.4e-6] * 2)
    assert saved["rules"]["kat"]["k"] == 3 and saved["notes"] == ["something differs"]
    assert "kept tokens" in saved["meaning"]
    assert saved["differences"][0]["against"] == "none" and saved["differences"][0]["avg_at_k"]["mean"] == 0.25
    assert saved["differences"][0]["at_equal"] == {} == saved["curves"]
    line = (
        "Not evaluated along the way, so not known at equal cost: none (seed 0, 1); kat (seed 0, 1). Set evaluation"
    )
    assert line in text and line in saved["not_at_equal_cost"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "none", "kta"], "is not a rule"),
        (["--rules", "none", "--seeds", "1", "1"], "same seed"),
        (["--rules", "none", "evaluation.data=null"], "evaluation.data = null"),
        (["--rules", "length_matched"], "add kat"),
        (["--rules", "kat:eta=["], "not valid YAML"),
        (["--seeds", "0", "x"], "--seeds x: must be whole numbers"),
        (["--seeds", "0", "-1"], "--seeds -1"),
        (["--evaluate-every", "1.5"], "--evaluate-every 1.5: must be a whole number from 0"),
        (["--seeds", "0", "1", "run.stpes=5"], "unknown field"),
        (["--rules", "none", "length_matched:run=/nowhere"], "no traces in it"),
    ],
)
def test_mistakes_are_one_message(capsys, tmp_path, arguments, message):
    assert cli.main(["compare", "demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_overrides_may_follow_seeds_and_rules(tmp_path, monkeypatch, capsys):
    seen = []
    module = types.ModuleType("actors.driver.train")
    module.train = lambda config: seen.append(config) or finish(config, [1, 0])
    monkeypatch.setitem(__import__("sys").modules, "actors.driver.train", module)
    arguments = [
        "--out",
        str(tmp_path),
        "--rules",
        "none",
        "kat",
        "run.steps=2",
        "--seeds",
        "4",
        "5",
        "learner.lr=2e-3",
    ]
    assert cli.main(["compare", "demo", *arguments]) == 0
    assert [(c.termination.rule, c.run.seed) for c in seen] == [("none", 4), ("kat", 4), ("none", 5), ("kat", 5)]
    assert {(c.run.steps, c.learner.lr) for c in seen} == {(2, 2e-3)}
    assert {(c.evaluation.every, c.evaluation.every_k) for c in seen} == {(1, 1)}
    out = capsys.readouterr().out
    assert "against" in out and "compare.html" in out and "note:" not in out
    assert out.startswith("evaluated along the way: evaluation.every = 1, evaluation.every_k = 1")
    assert "Each rule from the same start" in (tmp_path / "compare.html").read_text()


def test_the_stages_of_kat_keep_the_settings_of_kat(tmp_path):
    base = load_config("demo")
    arms = [config_of(base, parse_arm(a), 0, tmp_path) for a in ("kat", "kat_stages:put_back=after")]
    kat, stages = (a.termination for a in arms)
    assert stages.put_back == "after" and kat.window == stages.window == 32
    assert stages.model_dump(exclude={"rule", "put_back"}) == kat.model_dump(exclude={"rule"})


def test_a_comparison_that_was_moved_is_the_same(tmp_path):
    then = config_of(BASE, replace(parse_arm("length_matched"), of="kat"), 0, tmp_path / "old")
    save_config(then, tmp_path / "config.yaml")
    check_same(config_of(BASE, replace(parse_arm("length_matched"), of="kat"), 0, tmp_path / "new"), tmp_path)
    with pytest.raises(UserError, match=r"termination.run"):
        check_same(config_of(BASE, replace(parse_arm("length_matched"), of="hot"), 0, tmp_path / "new"), tmp_path)
