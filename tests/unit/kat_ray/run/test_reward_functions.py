"""Reward functions of a run: checked, tried, and asked beside the verdicts."""

import os
import re
from contextlib import closing

import pytest

from kat_ray.config.load import load_config
from kat_ray.data.golds import TrainingGolds
from kat_ray.data.prompts import PromptSet, load_prompts
from kat_ray.errors import UserError
from kat_ray.observability.metric_catalog import METRICS, check_names
from kat_ray.rewards.scoring import Answer, RewardRules, RewardScorer
from kat_ray.rewards.task import Task
from kat_ray.run.probes import RolloutGrader, grading_metrics
from kat_ray.run.reward_functions import (
    changed_files,
    check_golds_for_rewards,
    check_sources,
    file_digests,
    make_scorer,
    needs_golds,
    reward_files,
    try_functions,
)  # fmt: skip
from kat_ray.run.state import RunState
from kat_ray.types.records import Prompt
from tests.support.configs import make_config
from tests.support.paths import ROOT
from tests.support.tokenizers import make_tokenizer

CODE = "def score(completions, **kwargs):\n    return [float(len(completions[0]))]\n"
TASKS = {"a": Task("p", "p", "42"), "b": Task("q", "q")}
PROMPTS = PromptSet((Prompt("a", (1,), "42"), Prompt("b", (2,))), 0, "d", TASKS)


def ids_of(text):
    return [1] * len(text)


def config(weight=1.0, **functions):
    return make_config(
        "s", "t", data={"path": "d.jsonl"}, rollout={"rollouts_per_prompt": 2, "top_p": 1.0},
        objective={"rl": {"weight": weight}}, reward={"functions": functions},
    )  # fmt: skip


def test_verdicts_and_rewards_of_a_step(tmp_path):
    """Every rollout is rewarded; those with a gold answer have a verdict, too."""
    (tmp_path / "r.py").write_text(CODE)
    rules = RewardRules({f"{tmp_path}/r.py:score": 1.0, "integer": 0.5})
    grader = RolloutGrader(
        {"a": "42"}, lambda ids: "4" * len(ids) + "2", "integer", scorer=RewardScorer(rules, TASKS)
    )
    with closing(grader):
        graded = grader.grade({0: ("a", [1]), 1: ("a", [1, 2]), 2: ("b", [3])})
        assert graded.correct == {0: True, 1: False}
        assert {i: r.value for i, r in graded.rewards.items()} == {0: 2.5, 1: 3.0, 2: None}
        assert graded.rewards[1].parts == {"score": 3.0, "integer": 0.0}
        figures = grading_metrics(graded)
        check_names(figures)
        assert figures["reward/part/score"] == 7 / 3 and figures["probe/ran_out"] == 0
        only = grading_metrics(grader.grade({2: ("b", [3])}))
        assert only["reward/part/score"] == 2 and "probe/ran_out" not in only and "reward/part/integer" not in only
        assert grading_metrics(grader.grade({})) == {}


def test_names_of_parts_are_a_family():
    assert "reward/part/score" not in METRICS
    check_names(["reward/part/score", "reward/mean"])
    with pytest.raises(AssertionError, match="reward/parts"):
        check_names(["reward/parts"])


def test_files_are_looked_at_only_where_they_are_asked(tmp_path):
    missing = config(**{"no.py:f": 1.0})
    with pytest.raises(UserError, match=r"no\.py"):
        check_sources(missing)
    off = config(0.0, **{"no.py:f": 1.0})
    check_sources(off)
    try_functions(off, PROMPTS, ids_of)
    assert make_scorer(off, PROMPTS) is None and make_scorer(config(), PROMPTS) is None
    assert [needs_golds(c) for c in (off, config(), missing, config(**{"no.py:f": 1, "integer": 1}))] == [
        True, True, False, True
    ]  # fmt: skip
    given = config(**{"no.py:f": 1, "./x/y.py:f": 1, "/a.py:f": 1, "~/b.py:f": 1, "../c.py:f": 1, "integer": 1})
    assert reward_files(given) == ["no.py", "x/y.py"] and reward_files(off) == []


def test_functions_are_tried_in_a_child(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(CODE)
    try_functions(config(**{f"{path}:score": 1.0}), PROMPTS, ids_of)
    path.write_text("import os\nos.environ['RAN_HERE'] = 'yes'\ndef score(completions): return 'high'\n")
    with pytest.raises(UserError, match="prompt a with the answer '42', and gave no reward: returned 'high'"):
        try_functions(config(**{f"{path}:score": 1.0}), PROMPTS, ids_of)
    assert "RAN_HERE" not in os.environ


def test_the_path_of_the_documentation(tmp_path, monkeypatch):
    """The files of docs/rl.md, from prompts and a function to a configuration that is accepted, and rewards."""
    page = (ROOT / "docs/rl.md").read_text().partition("## From prompts")[2]
    for name, language in (("prompts.jsonl", "json"), ("my_rewards.py", "python"), ("my.yaml", "yaml")):
        (tmp_path / name).write_text(re.search(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)[1])
    monkeypatch.chdir(tmp_path)
    given = load_config("my.yaml")
    check_sources(given)
    prompts = load_prompts(given.data, make_tokenizer(), None, with_tasks=True)
    try_functions(given, prompts, ids_of)
    with closing(make_scorer(given, prompts)) as scorer:
        first = prompts.prompts[0].prompt_id
        rewards = scorer.score({0: Answer(first, "It rains.", (1,)), 1: Answer(first, "a b c d e f", (1,))}).rewards
    assert [r.value for r in rewards.values()] == pytest.approx([-10 / 12 + 0.1, -0.5])


def test_another_file_under_the_same_path_is_told_at_a_resume(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE + "other = score\n")
    given = config(**{f"{path}:score": 1.0, f"{path}:other": 1.0, "integer": 1.0})
    before = file_digests(given)
    assert list(before) == [str(path)] and list(changed_files(before, before)) == []
    path.write_text(CODE + "other = score  # mended\n")
    (said,) = changed_files(RunState(reward_files=before).reward_files, file_digests(given))
    assert said.startswith(
        f"reward.functions: {path} has changed since the checkpoint (sha256 {before[str(path)][:12]}"
    )
    assert list(changed_files(RunState().reward_files, before)) == [], "a checkpoint from before this was kept"
    assert file_digests(config(0.0, **{"no.py:f": 1.0})) == {}


def test_a_run_that_could_never_have_a_reward_is_refused(tmp_path):
    nothing, some = TrainingGolds({}, None), TrainingGolds({"a": "42"}, None)
    with pytest.raises(
        UserError, match=r"d: objective\.rl\.weight = 1, and no prompt has a gold answer .*'answer'"
    ):
        check_golds_for_rewards(config(), PROMPTS, nothing)
    check_golds_for_rewards(config(), PROMPTS, some)
    check_golds_for_rewards(config(0.0), PROMPTS, nothing)
    check_golds_for_rewards(config(**{"no.py:f": 1}), PROMPTS, nothing)
    with pytest.raises(UserError, match="no prompt has a gold answer"):
        check_golds_for_rewards(config(integer=1), PROMPTS, nothing)
