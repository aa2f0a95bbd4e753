"""Runs that are finished are compared: what differs besides the rule, what is not paired, what is damaged."""

import json
import math
from pathlib import Path

import pytest

from kat_ray.analysis.compare import config_of, parse_arm
from kat_ray.analysis.compare_results import notes_of, read_finished, read_runs
from kat_ray.analysis.compare_table import paired
from kat_ray.cli import main as cli
from kat_ray.config.load import save_config
from kat_ray.errors import UserError
from tests.support.comparisons import BASE, SUMMARY, changed, finish, finish_rule


def test_finished_runs_are_compared_and_their_other_differences_named(tmp_path, capsys):
    for rule, seed, right in (("none", 0, [3, 0]), ("none", 1, [0, 0]), ("kat", 0, [3, 3]), ("kat", 1, [3, 0])):
        finish_rule(tmp_path, rule, seed, right)
    hot = config_of(changed(BASE, "learner", lr=9e-4), parse_arm("kat:eta=0.5"), 0, tmp_path)
    finish(hot, [3, 3])
    finish(changed(hot, "run", name="again", steps=4), [0, 0])
    runs = [tmp_path / rule / f"seed-{seed}" for rule in ("none", "kat") for seed in (0, 1)]
    results, notes = read_runs(runs)
    assert [(r.label, r.seeds) for r in results] == [("none", (0, 1)), ("kat", (0, 1))]
    assert not notes and not notes_of(results)
    runs += [Path(hot.run.dir) / "seed-0", Path(hot.run.dir) / "again"]
    results, notes = read_runs(runs)
    assert [r.label for r in results][1:] == ["kat-eta=0.3", "kat-eta=0.5-steps=3", "kat-eta=0.5-steps=4"]
    assert all("more than the rule: learner.lr: 0.0009, was 0.001" in note for note in notes), "of another rule"
    assert not any("run.steps" in note for note in notes), "the label says it"
    assert cli.main(["compare", "--runs", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    assert "note: " in (out := capsys.readouterr().out) and "compare.html" in out
    html = (tmp_path / "page" / "compare.html").read_text()
    assert "more than the rule: learner.lr" in html and 'id="differences"' in html
    assert "from the same start" not in html and "The runs differ in more than their rules" in html
    assert (tmp_path / "page" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "page" / "compare.json").read_text())
    by_rule = {d["rule"]: d for d in document["differences"]}
    assert by_rule["kat-eta=0.3"]["avg_at_k"]["mean"] == pytest.approx(0.5)
    assert by_rule["kat-eta=0.5-steps=3"]["seeds"] == [0], "paired on the seeds that both have"
    assert any("not all rules have the same seeds" in note for note in document["notes"])


def test_other_problems_are_not_paired(tmp_path):
    def other(**fields):
        return changed(BASE, "evaluation", **fields)

    base = finish_rule(tmp_path, "none", 0, [1, 0])
    for number, evaluation in enumerate(
        (
            other(data=BASE.evaluation.data.model_copy(update={"path": "demo:train"})),
            other(data=BASE.evaluation.data.model_copy(update={"limit": 2})),
            other(max_tokens=100),
            other(temperature=0.5),
            other(verifier="math"),
            changed(BASE, "run", seed=0).model_copy(update={"evaluation": BASE.evaluation, "rollout":
                BASE.rollout.model_copy(update={"max_tokens": 100})}),
        )
    ):  # fmt: skip
        run = finish_rule(tmp_path / str(number), "kat", 0, [1, 1], evaluation)
        results, notes = read_runs([base, run])
        assert not paired(results) and "more than the rule" in notes[0]
    same = other(every=1, every_k=1, teacher=False, data=BASE.evaluation.data.model_copy(update={"shuffle": False}))
    assert paired(read_runs([base, finish_rule(tmp_path / "same", "kat", 0, [1, 1], same)])[0])


def test_one_rule_evaluated_in_two_ways_is_two_arms(tmp_path):
    short = changed(BASE, "evaluation", max_tokens=100)
    runs = [finish_rule(tmp_path, "kat", 0, [1, 0]), finish_rule(tmp_path, "kat", 1, [1, 0, 3], short)]
    assert [r.seeds for r in read_runs(runs)[0]] == [(0,), (1,)]


def test_runs_of_one_rule_are_told_apart_by_the_fields_that_vary(tmp_path):
    """Seeds of one configuration are one arm, whatever else was compared."""

    def kat(name, seed, **rl):
        opd = BASE.objective.model_copy(update={"rl": BASE.objective.rl.model_copy(update=rl)})
        return finish_rule(tmp_path / name, "kat", seed, [1, 0], BASE.model_copy(update={"objective": opd}))

    ways = {"a": {"cut_reward": "failure"}, "b": {"cut_reward": "exclude"}}
    runs = [kat(name, seed, **rl) for seed in (0, 1) for name, rl in ways.items()]
    results, notes = read_runs(runs)
    assert [(r.label, r.seeds) for r in results] == [
        ("kat-cut_reward=failure", (0, 1)), ("kat-cut_reward=exclude", (0, 1))
    ]  # fmt: skip
    assert notes == []
    results, notes = read_runs([*runs, kat("again", 0, cut_reward="exclude")])
    assert [r.label for r in results][:2] == ["kat-cut_reward=failure", "kat-cut_reward=exclude"]
    assert results[2].label == f"kat ({tmp_path / 'again' / 'kat' / 'seed-0'})", "a second run of that seed"
    many = kat("many", 0, cut_reward="exclude", advantage="rloo", aggregate="sequence_mean", dual_clip=4.0)
    results, notes = read_runs([*runs, many])
    assert [r.seeds for r in results] == [(0, 1), (0, 1), (0,)] and f"({many})" in results[2].label
    assert "objective.rl.advantage: 'rloo', was 'grpo'" in notes[-1]


def test_software_and_start_are_compared(tmp_path):
    runs = [finish_rule(tmp_path, "none", s, [1, 0]) for s in (0, 1)]
    runs += [finish_rule(tmp_path, "kat", 0, [1, 0], git_commit="b", versions={"torch": "2"})]
    runs += [finish_rule(tmp_path, "kat", 1, [1, 0], eval_before=SUMMARY["eval_before"] | {"avg_at_k": 0.2})]
    commit, torch, start = notes_of(read_runs(runs)[0])
    assert commit.startswith("git_commit differs: a in ") and commit.endswith(f"; b in {runs[2]}")
    assert torch.startswith("torch differs: 1 in ")
    assert start.startswith("seed 1: none and kat do not start alike (before training: avg_at_k 0.1 and 0.2)")


def test_runs_that_cannot_be_compared_are_named(tmp_path, capsys):
    done = str(finish_rule(tmp_path, "none", 0, [3, 0]))
    (tmp_path / "open").mkdir()
    save_config(BASE, tmp_path / "open" / "config.yaml")
    for arguments, message in (
        (["--runs", str(tmp_path)], "no config.yaml"),
        (["--runs", done, str(tmp_path / "open")], "its run has not ended"),
        (["--runs", done, f"{done}/../seed-0"], "the same run is named twice"),
        (["demo", "--runs", done], "leave demo out"),
        (["--runs", done, "--seeds", "0"], "leave --seeds out"),
        (["--runs", done, "--rules", "kat"], "leave --rules out"),
        (["--runs", done, "--evaluate-every", "0"], "leave --evaluate-every out"),
        ([], "name a configuration file"),
    ):
        assert cli.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", '{"steps": 3, "kept', "is damaged"),
        ("summary.json", "{}", "rollouts_started, .* are missing"),
        ("evaluations.jsonl", None, "is missing or empty"),
        ("evaluations.jsonl", '{"k": 3, "right": [0, 0]}\n{"k": 3, "ri', "jsonl:2 is half a line"),
        ("evaluations.jsonl", '{"k": 3, "right": [0, 0]}\n', "cut off: its last line"),
    ],
)
def test_damaged_records_are_one_message(tmp_path, name, content, message):
    folder = finish_rule(tmp_path, "none", 0, [3, 0])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{message}" if "jsonl:" not in message else message):
        read_finished(folder)


def test_metrics_are_read_up_to_the_damage(tmp_path, capsys):
    runs = [finish_rule(tmp_path, rule, 0, [3, 0]) for rule in ("none", "kat")]
    text = (runs[1] / "metrics.jsonl").read_text()
    (runs[1] / "metrics.jsonl").write_text(text[:-9])
    assert math.isnan(read_finished(runs[1]).measures["training_seconds"])
    assert cli.main(["compare", "--runs", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "metrics.jsonl:4 is half a line" in out and "holds 2 of 3 steps: training seconds are not known" in out
    assert json.loads((tmp_path / "page" / "compare.json").read_text())["rules"]["kat"]["training_seconds"] == [
        None
    ]
    html = (tmp_path / "page" / "compare.html").read_text()
    assert html.count("metrics.jsonl:4 is half a line") == 1 and "<td>-</td>" in html
