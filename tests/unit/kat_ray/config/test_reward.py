"""The section `reward`: what is refused, and in which words."""

import pytest

from kat_ray.config import Config
from kat_ray.config.load import load_config
from kat_ray.errors import ConfigError
from kat_ray.rewards.limits import GradingLimits

RL = """\
student: {path: a}
teacher: {path: b}
objective: {rl: {weight: 1}}
rollout: {rollouts_per_prompt: 4, top_p: 1}
"""


def load(tmp_path, text, data="{path: c.jsonl}"):
    path = tmp_path / "c.yaml"
    path.write_text(f"{RL}data: {data}\n{text}")
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "reward: {functions: {score: 1}}",
            "reward.functions.score: must be FILE.py:NAME, such as my_rewards.py:score",
        ),
        ("reward: {functions: {'r.py': 1}}", "reward.functions.r.py: must be FILE.py:NAME"),
        ("reward: {functions: {'r.py:a.b': 1}}", "must be FILE.py:NAME"),
        ("reward: {functions: {'s3://b/r.py:f': 1}}", "is the address of an object store or server"),
        ("reward: {functions: {'r.py:f': much}}", 'reward.functions.r.py:f = "much": must be a number'),
        ("reward: {functions: {'r.py:f': .inf}}", "reward.functions.r.py:f = Infinity: must be a number"),
        ("reward: {functions: {'r.py:f': true}}", "reward.functions.r.py:f = true: must be a number"),
        ("sampler: {resources: {TPU: true}}", "sampler.resources.TPU = true: must be a number"),
        ("reward: {functions: {'r.py:f': 0}}", "reward.functions: every weight is 0"),
        ("reward: {functions: {format: 1}}", "reward.functions.format: needs format_pattern"),
        ("reward: {format_pattern: 'a{99999999999999}'}", "is no regular expression"),
        ("reward: {format_pattern: '(a'}", "reward.format_pattern = '(a': is no regular expression: missing )"),
        ("reward: {workers: 0}", "reward.workers = 0: must be a whole number >= 1"),
        ("reward: {max_error_share: 2}", "reward.max_error_share = 2: must be a number >= 0 and <= 1"),
        ("reward: {functions: {math: 1}}", "reward.functions: math: must be integer, as evaluation.verifier is"),
        (
            "reward: {functions: {math: 1, integer: 1}}\nevaluation: {verifier: math}",
            "reward.functions: math and integer: must be math",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert said in str(error.value)


def test_only_what_grades_by_gold_answers_asks_for_them(tmp_path):
    none = "{path: c.jsonl, answer_column: null}"
    for text in ("", "reward: {functions: {integer: 1, 'r.py:f': 1}}"):
        with pytest.raises(ConfigError, match="needs gold answers to grade rollouts by"):
            load(tmp_path, text, none)
    config = load(tmp_path, "reward: {functions: {'r.py:f': 1, format: 0.1}, format_pattern: ^x}", none)
    assert config.reward.verifiers == []


def test_without_rl_functions_are_not_looked_at():
    sections = {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c.jsonl"}}
    Config.model_validate(sections | {"reward": {"functions": {"math": 1.0}}})


def test_the_rules_have_the_fields(tmp_path):
    rules = load(
        tmp_path,
        "reward: {functions: {'r.py:f': 2}, workers: 3, seconds: 4, step_seconds: 50, memory_gib: 6, "
        "calls_at_once: 7, threshold: 0.5}",
    ).reward.rules
    assert rules.limits == GradingLimits(3, 4.0, 50.0, 6.0, "reward.", 7)
    assert (rules.weights, rules.threshold) == ({"r.py:f": 2.0}, 0.5)
    assert rules.limits.words("step_seconds") == "reward.step_seconds = 50"
