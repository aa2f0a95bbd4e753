"""Held-out sets: presets, what is given beside them, and what is refused."""

import pytest

from kat_ray.config.load import config_from, config_yaml, load_config
from kat_ray.errors import ConfigError

REST = {"student": {"path": "a"}, "teacher": {"path": "b"}, "data": {"path": "c.jsonl"}}


def evaluation_of(**fields):
    return config_from({**REST, "evaluation": fields}).evaluation


def test_a_preset_is_filled_in_beneath_what_is_given(tmp_path):
    found = evaluation_of(preset="gsm8k", data={"chat_template": True, "limit": 50})
    assert (found.verifier, found.k, found.data.path, found.data.name) == ("integer", 1, "openai/gsm8k", "main")
    assert (found.data.chat_template, found.data.limit, found.data.answer_after) == (True, 50, "####")
    given = evaluation_of(preset="math500", k=8, data={"path": "/mine/math", "instruction": None})
    assert (given.verifier, given.k, given.data.path, given.data.instruction) == ("math", 8, "/mine/math", None)
    for name, k in (("aime24", 16), ("aime25", 16), ("math500", 4)):
        own = evaluation_of(preset=name)
        assert own.k == k and own.data.prompt_column == "problem" and "\\boxed{}" in own.data.instruction
    for name in ("amc23", "minerva"):
        own = evaluation_of(preset=name)
        assert (own.k, own.verifier, own.data.split, own.data.prompt_column) == (8, "math", "test", "question")


def test_a_set_takes_what_it_does_not_say_from_the_section():
    sets = {
        "math": {"preset": "math500", "temperature": 0.6},
        "mine": {"data": {"path": "x.jsonl"}, "verifier": "math", "greedy": False, "max_tokens": 9},
        "plain": {"data": {"path": "y.jsonl"}},
    }
    parts = evaluation_of(data={"path": "h"}, k=3, top_p=0.9, greedy=True, sets=sets).parts()
    assert list(parts) == ["", "greedy", "math", "math/greedy", "mine", "plain", "plain/greedy"]
    shown = {n: (p.k, p.verifier, p.temperature, p.top_p, p.max_tokens) for n, p in parts.items()}
    assert shown == {
        "": (3, "integer", 1.0, 0.9, None), "greedy": (1, "integer", 0.0, 0.9, None),
        "math": (4, "math", 0.6, 0.9, None), "math/greedy": (1, "math", 0.0, 0.9, None),
        "mine": (3, "math", 1.0, 0.9, 9), "plain": (3, "integer", 1.0, 0.9, None),
        "plain/greedy": (1, "integer", 0.0, 0.9, None),
    }  # fmt: skip
    assert list(evaluation_of(data={"path": "h"}).parts()) == [""] and evaluation_of().parts() == {}


def test_a_runs_own_configuration_says_the_same_again(tmp_path):
    sets = {"math": {"preset": "math500"}, "mine": {"data": {"path": "x.jsonl"}}}
    config = config_from({**REST, "evaluation": {"preset": "gsm8k", "sets": sets}}, ["evaluation.sets.math.k=2"])
    (tmp_path / "c.yaml").write_text(config_yaml(config))
    again = load_config(tmp_path / "c.yaml")
    assert again == config and again.evaluation.parts()["math"].k == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"sets": {"a": {"preset": "gsm8k"}}},
            "evaluation.sets: are evaluated beside evaluation.data, which is null",
        ),
        ({"preset": "gsm9k"}, 'evaluation.preset = "gsm9k": must be one of gsm8k, .* did you mean gsm8k?'),
        ({"preset": "gsm8k", "sets": {"greedy": {"preset": "aime24"}}}, "'greedy' is no name of a set"),
        ({"preset": "gsm8k", "sets": {"a b": {"preset": "aime24"}}}, "'a b' is no name of a set"),
        (
            {"preset": "gsm8k", "sets": {"a": {}}},
            "evaluation.sets.a.data is missing: name its problems, or a preset",
        ),
        ({"preset": "gsm8k", "data": 3}, "evaluation.data = 3: must be a section"),
        (
            {"preset": "gsm8k", "sets": {"a": {"data": {"path": "environment:heldout"}}}},
            "only evaluation.data is made by the environment",
        ),
        (
            {"preset": "gsm8k", "sets": {"a": {"data": {"path": "x", "answer_column": None}}}},
            "held-out problems need a column with the gold answer",
        ),
        ({"preset": "gsm8k", "sets": {"a": {"preset": "aime24", "kk": 2}}}, "evaluation.sets.a.kk: unknown field"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        evaluation_of(**fields)
