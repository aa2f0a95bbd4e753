"""Advantages of a run from its traces: to the bit, and what other settings would have made of its rewards."""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kat_ray.analysis.objective import differences, recorded_steps, replayed, with_objective, without_history, worth
from kat_ray.analysis.ratios import policy_ratios, ratio_words
from kat_ray.analysis.replay import load_table, traces_from, uncensored
from kat_ray.analysis.replay_rules import sweep
from kat_ray.cli import main as cli
from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.errors import UserError
from kat_ray.records.traces import SCHEMA
from kat_ray.termination import RunFacts
from tests.support.rewarded import RULE, with_rewards, written
from tests.support.scenarios import ALONE, LAYOUTS, Run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run = Run(0, with_rewards())
    result = run.go()
    assert result.error is None and result.finished
    return written(run, tmp_path_factory.mktemp("recorded") / "run")


def rows_of(path, step):
    return pq.read_table(path / "traces" / f"step-{step:06d}.parquet").to_pylist()


def altered(path, to, step, change):
    """A copy of a run in which the rows of one step are changed."""
    (to / "traces").mkdir(parents=True)
    for file in sorted((path / "traces").glob("*.parquet")):
        table = pq.read_table(file)
        if file.name == f"step-{step:06d}.parquet":
            table = change(table)
        pq.write_table(table, to / "traces" / file.name)
    (to / "config.yaml").write_text((path / "config.yaml").read_text())
    return to


@pytest.mark.parametrize(
    "rl",
    [
        {},
        {"advantage": "dr_grpo", "aggregate": "sequence_mean"},
        {"advantage": "rloo", "aggregate": "constant", "truncated": "zero"},
        {"advantage": "reinforce_pp", "cut_reward": "exclude"},
        {"advantage": "dr_grpo", "cut_reward": "probe_weighted", "aggregate": "sequence_sum"},
        {"advantage": "rloo", "cut_reward": "probe_weighted", "aggregate": "constant", "truncated": "exclude"},
        {"advantage": "reinforce_pp_baseline", "aggregate": "sequence_sum"},
        {"advantage": "max_rl"},
        {"cut_reward": "probe_mean", "probe_min": 1, "probe_buffer": 64, "advantage": "dr_grpo"},
        {"overlong": {"buffer": 8, "factor": 0.5}, "advantage_clip": 0.75, "advantage": "rloo"},
        {"filter_constant_groups": True, "cut_reward": "exclude", "final_weight": 0.5, "anneal_steps": 2},
    ],
)
def test_what_a_run_gave_its_rollouts_comes_out_again_to_the_bit(tmp_path, rl):
    run = Run(1, with_rewards(**rl))
    assert run.go().error is None
    config = load_config(written(run, tmp_path / "run") / "config.yaml")
    steps, notes = recorded_steps(tmp_path / "run", config)
    credits = replayed(steps, config)
    assert notes == [] and differences(steps, credits) == []
    values = [c for step in steps for c in step.written.values()]
    assert len(values) == 3 * 24 and len({c.advantage for c in values}) > 4
    cut_reward = rl.get("cut_reward", "failure")
    assert any(not c.reward_weight for c in values) == (cut_reward in ("exclude", "probe_weighted"))
    if cut_reward == "probe_mean":
        assert any(c.metrics.get("probe/q", 0) > 0 for c in credits), (
            "what earlier steps' probes were worth is taken along"
        )
    if cut_reward == "probe_weighted":
        assert {1 / RULE["probe_share"]} < {c.reward_weight for c in values}


def test_a_run_without_a_teacher_is_replayed_as_well(tmp_path, capsys):
    run = Run(0, LAYOUTS[ALONE])
    assert run.go().error is None
    assert cli.main(["replay", str(written(run, tmp_path / "run")), "--objective"]) == 0
    count = sum(len(rows) for rows in run.records.traces.values())
    assert f"gives the credit of all {count} rollouts to the bit" in capsys.readouterr().out


def test_traces_hold_what_the_learner_was_given(recorded):
    """The step by hand: rewards of whoever has an answer, tokens up to the confirmation, their denominator."""
    rows = [row for step in range(3) for row in rows_of(recorded, step)]
    for row in rows:
        cut = row["cut"] is not None
        assert (row["reward"] is None) == cut and row["reward_error"] is None
        assert cut or dict(row["rewards"]) == {"integer": row["reward"]} == {"integer": float(row["correct"])}
        assert row["policy_tokens"] == (row["confirmed"] if cut else len(row["token_ids"]))
        assert row["reward_weight"] == 1.0 and row["probe_share"] == RULE["probe_share"]
        assert len(row["sampled_logprobs"]) == len(row["token_ids"]) and max(row["sampled_logprobs"]) <= 0
    assert any(row["cut"] is not None for row in rows) and any(row["would_cut"] is not None for row in rows)
    assert any(row["confirmed"] not in (None, len(row["token_ids"])) for row in rows), "overshoot has one, too"
    for step in range(3):
        mine = [row for row in rows if row["step"] == step]
        assert sum(row["policy_tokens"] * row["policy_weight"] for row in mine) == pytest.approx(1.0)
        groups = {row["prompt_id"] for row in mine}
        for group in groups:
            assert sum(r["advantage"] for r in mine if r["prompt_id"] == group) == pytest.approx(0, abs=1e-9)


def test_a_changed_advantage_is_found_and_named(recorded, tmp_path, capsys):
    row = rows_of(recorded, 1)[5]
    other = row["advantage"] + 2.0**-50  # far below what a picture or a sum would show

    def change(table):
        values = table.column("advantage").to_pylist()
        values[5] = other
        at = table.column_names.index("advantage")
        return table.set_column(at, SCHEMA.field("advantage"), [values])

    run = altered(recorded, tmp_path / "run", 1, change)
    assert cli.main(["replay", str(run), "--objective"]) == 0
    text = capsys.readouterr().out
    assert "warning: the run's own objective, computed again, differs in 1 of 72 rollouts" in text
    assert f"advantage of rollout {row['rollout_id']} in step 1 is {other!r} in the traces" in text
    assert f"{row['advantage']!r} computed" in text


def test_the_command_shows_what_other_settings_would_do(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    settings = ["advantage=[grpo, rloo]", "cut_reward=[failure, exclude]"]
    assert cli.main(["replay", str(recorded), "--objective", *settings, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "computed again, gives the credit of all 72 rollouts to the bit" in text
    assert [line.split()[0] for line in text.splitlines() if "rloo" in line] == ["rloo"] * 2
    assert any(line.startswith("the run") and "grpo" in line for line in text.splitlines())
    own, same, _, rloo, excluded = csv.DictReader((out / "objective.csv").open())
    assert own == {**same, "the_run": "1"} and (own["advantage"], own["cut_reward"]) == ("grpo", "failure")
    assert float(same["correlation"]) == pytest.approx(1) and 0 < float(rloo["correlation"]) < 1
    cut = sum(row["cut"] is not None for step in range(3) for row in rows_of(recorded, step))
    assert cut and excluded["left out: cut"] == str(cut) and rloo["left out: cut"] == "0"


def test_figures_of_a_setting_by_hand(recorded):
    config = load_config(recorded / "config.yaml")
    steps, _ = recorded_steps(recorded, config)
    own = replayed(steps, config)
    other = replayed(steps, with_objective(config, {"advantage": "dr_grpo"}))
    figures = worth({"advantage": "dr_grpo"}, other, own)
    sizes = []
    for step in steps:
        by_group = {}
        for spec in step.ended.specs:
            by_group.setdefault(spec.prompt_id, []).append(step.ended.rewards.get(spec.rollout_id))
        means = {g: sum(r.value for r in rewards if r) / len(rewards) for g, rewards in by_group.items()}
        values = [abs((r.value if r else 0.0) - means[g]) for g, rewards in by_group.items() for r in rewards]
        sizes.append(sum(values) / len(values))
    assert figures.abs_mean == pytest.approx(sum(sizes) / 3)
    assert 0.9 < figures.correlation < 1 and figures.left_out == {}


def test_a_step_that_is_not_whole_is_left_out_and_said(recorded, tmp_path, capsys):
    run = altered(recorded, tmp_path / "run", 0, lambda table: table.slice(0, 20))
    assert cli.main(["replay", str(run), "--objective"]) == 0
    text = capsys.readouterr().out
    assert "warning: left out 1 steps whose rewards are not all there: 0" in text
    assert "of all 48 rollouts to the bit" in text


def test_after_a_step_that_is_not_whole_imputed_rewards_are_not_held_against_the_traces(tmp_path, capsys):
    """They are once as many newer probes are known as the buffer holds."""
    imputed = {"cut_reward": "probe_mean", "probe_min": 1, "advantage": "dr_grpo"}
    run = Run(1, {**with_rewards(**imputed, probe_buffer=2), "run": {"steps": 6}})
    assert run.go().finished
    whole = written(run, tmp_path / "whole")
    damaged = altered(whole, tmp_path / "damaged", 1, lambda table: table.slice(0, 20))
    config = load_config(damaged / "config.yaml")
    steps, _ = recorded_steps(damaged, config)
    credits = replayed(steps, config)
    unknown = without_history(steps, credits, config)
    assert unknown and set(unknown.values()) == {1} and 0 not in unknown and 5 not in unknown
    assert differences(steps, credits) and not differences(steps, credits, unknown)
    assert cli.main(["replay", str(damaged), "--objective"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"gives the credit of all {24 * (5 - len(unknown))} rollouts to the bit; " in text
    assert "from 2 on cannot be compared: with cut_reward = probe_mean they depend on the probes of step 1" in text
    assert without_history(steps, credits, with_objective(config, {"cut_reward": "failure"})) == {}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"rule": "fixed_prefix", "n": 8, "probe_share": 0.0},
            "'probe_weighted': needs termination.probe_share > 0",
        ),
        ({"rule": "progressive", "start": 16}, "termination.rule = 'progressive' bounds lengths"),
    ],
    ids=["no probes", "progressive"],
)
def test_what_no_run_is_allowed_is_not_replayed(rule, message):
    config = Run(0, with_rewards()).config
    config = Config.model_validate(config.model_dump() | {"termination": rule})
    weighted = {"cut_reward": "probe_weighted", "advantage": "rloo", "aggregate": "constant"}
    with pytest.raises(UserError, match=message):
        with_objective(config, weighted)
    assert with_objective(config, {"cut_reward": "exclude"}).objective.rl.cut_reward == "exclude"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["advantage=best"],
            'objective.rl.advantage = "best": must be one of grpo, dr_grpo',
        ),
        (["cut_reward=probe_weighted"], "must be 'rloo' or 'dr_grpo' with cut_reward = 'probe_weighted'"),
        (["cut=3"], "must be FIELD=VALUE or FIELD=[VALUE, ...] with one of advantage, min_std"),
        (["clip=[0.1, 0.2]"], "objective.rl.clip is the learner's, which a replay does without"),
        (["--rule", "kat"], "--rule: is of a termination rule"),
        (["--budget", "0.1"], "--budget: is of a termination rule"),
    ],
)
def test_mistakes_are_one_message(recorded, capsys, arguments, message):
    assert cli.main(["replay", str(recorded), "--objective", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_rewards_and_traces_of_before_are_refused(recorded, tmp_path, capsys):
    plain = Run(0)
    plain.go()
    assert all(row.policy is None for rows in plain.records.traces.values() for row in rows)
    path = written(plain, tmp_path / "plain")
    assert cli.main(["replay", str(path), "--objective"]) == 2
    assert "objective.rl.weight = 0: the run did not learn from rewards" in capsys.readouterr().err
    columns = [name for name in SCHEMA.names if name not in ("reward_weight", "advantage", "sampled_logprobs")]
    old = tmp_path / "old"
    for step in range(3):
        source = recorded if step == 0 else old
        old = altered(source, tmp_path / f"old-{step}", step, lambda table: table.select(columns))
    assert cli.main(["replay", str(old), "--objective"]) == 2
    assert "its traces have no columns reward_weight and advantage" in capsys.readouterr().err


def test_verdicts_on_rollouts_that_the_rule_let_pass_say_nothing_of_its_cuts(recorded):
    """With rewards they are graded as well; whoever asks what a cut costs goes by those seen to their end alone."""
    config = load_config(recorded / "config.yaml")
    facts = RunFacts(config.run.seed, config.rollout.max_tokens)
    table, _ = load_table(recorded)
    rows = table.to_pylist()
    passed = [not r["probe"] and r["threshold"] is not None and r["correct"] is not None for r in rows]
    assert sum(passed) > 5
    flipped = [r["correct"] != was for r, was in zip(rows, passed, strict=True)]
    flipped = [None if r["correct"] is None else f for r, f in zip(rows, flipped, strict=True)]
    at = table.column_names.index("correct")
    other = table.set_column(at, SCHEMA.field("correct"), pa.array(flipped))
    found = []
    for one in (table, other):
        seen = uncensored(traces_from(one), config)
        found.append(sweep(seen, config.termination, {"eta": [0.2, 0.5]}, facts))
    assert found[0] == found[1] and 0 < found[0][0].right_share < 1
    own = [r for r in rows if r["probe"] and r["threshold"] is not None and r["correct"] is not None]
    step = max(r["step"] for r in rows)
    metrics = json.loads((recorded / "metrics.jsonl").read_text().splitlines()[step])
    last = [r["correct"] for r in own if r["step"] == step]
    assert metrics["probe/right_share"] == pytest.approx(sum(last) / len(last)), "of probes"


def test_the_ratio_of_learner_to_sampler_is_shown_where_both_are_recorded(recorded, tmp_path, capsys):
    """The learner of these runs has log p + 1/4 of every token."""
    run = Run(0, with_rewards() | {"run": {"learner_logprobs": True}})
    assert run.go().error is None
    path = written(run, tmp_path / "run")
    steps, _ = recorded_steps(path, load_config(path / "config.yaml"))
    ratios = policy_ratios(steps)
    rows = [row for step in range(3) for row in rows_of(path, step)]
    assert len(ratios) == sum(row["policy_tokens"] for row in rows)
    assert ratios == pytest.approx(math.exp(0.25), rel=1e-6)
    for row in rows:
        kept = max(row["policy_tokens"], len(row["token_ids"]) if row["cut"] is None else row["cut"])
        assert len(row["learner_logprobs"]) == kept, "all that it was given, and nothing of the rest"
    assert cli.main(["replay", str(path), "--objective"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"sampler, {len(ratios):,} tokens of the policy's loss: mean 1.28403" in text
    assert "below 0.8: 0.00%, above 1.28: 100.00%" in text
    own = rows_of(recorded, 0)
    assert all(row["learner_logprobs"] is None for row in own)
    others = [{k: v for k, v in row.items() if k != "learner_logprobs"} for row in rows_of(path, 0)]
    assert others == [{k: v for k, v in row.items() if k != "learner_logprobs"} for row in own]
    assert cli.main(["replay", str(recorded), "--objective"]) == 0
    assert "ratio of learner" not in capsys.readouterr().out


def test_a_distribution_of_ratios_by_hand():
    ratios = np.array([0.5, 1.0, 1.0, 1.5, 2.0])
    assert ratio_words(ratios, (0.2, 0.5)) == (
        "ratio of learner to sampler, 5 tokens of the policy's loss: mean 1.2, 1% below 0.52, 50% below 1, "
        "99% below 1.98, the largest 2; below 0.8: 20.00%, above 1.5: 20.00%"
    )
