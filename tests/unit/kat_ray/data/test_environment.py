"""Rows of an environment: made once, in a child process; the same again, and no question in both splits."""

import json
import math
import re
from dataclasses import replace

import pytest

from kat_ray.config import Config, DataConfig, EnvironmentConfig
from kat_ray.config.environment import unused_environment
from kat_ray.config.load import load_config
from kat_ray.data import environment as rows_module
from kat_ray.data.environment import columns_of
from kat_ray.data.golds import training_golds
from kat_ray.data.prompt_order import PromptOrder
from kat_ray.data.prompts import load_prompts
from kat_ray.errors import DataError
from kat_ray.rewards.limits import Fault, Reply
from tests.support.paths import ROOT
from tests.support.tokenizers import TEMPLATE, make_tokenizer

# Few different questions, so that those of both splits would meet.
FAMILIES = {
    "gcd": {"weight": 2, "settings": {"min_value": 1, "max_value": 12}},
    "coin_flip": {"settings": {"min_trials": 3, "max_trials": 5}},
}
MADE = EnvironmentConfig(families=FAMILIES, train=60, heldout=21, prompt="{question}\nAnswer:")


@pytest.fixture(scope="module")
def splits():
    rows_module._splits.cache_clear()
    return {split: columns_of(MADE, split) for split in ("train", "heldout")}


def questions(columns):
    return [row["prompt"] for row in columns]


def test_splits_are_as_long_as_asked_and_share_no_question(splits):
    train, heldout = splits["train"], splits["heldout"]
    assert (len(train), len(heldout)) == (60, 21)
    assert len({*questions(train), *questions(heldout)}) == 81
    assert [row["family"] for row in train].count("gcd") == 40 and {r["family"] for r in heldout} == {*FAMILIES}
    assert len({row["id"] for row in (*train, *heldout)}) == 81
    for row in train[:12]:  # families are mixed throughout, as they are weighed
        assert row["prompt"].endswith("\nAnswer:")
    assert [row["family"] for row in train[:12]].count("gcd") == 8
    row = next(r for r in train if r["family"] == "gcd")
    assert int(row["answer"]) == math.gcd(*map(int, re.findall(r"\d+", row["prompt"])))
    problem = json.loads(row["problem"])
    assert problem["family"] == "gcd" and problem["settings"] == FAMILIES["gcd"]["settings"]


def test_another_process_makes_the_same(splits):
    rows_module._splits.cache_clear()
    more = MADE.model_copy(update={"train": 30})
    assert questions(columns_of(more, "heldout")) == questions(splits["heldout"]), "however many there are to train"
    assert {*questions(columns_of(more, "train"))} < {*questions(splits["train"])}
    rows_module._splits.cache_clear()
    assert {split: columns_of(MADE, split) for split in splits} == splits


def test_prompts_hold_their_problem(splits):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    data = DataConfig(path="environment:train", chat_template=True)
    found = load_prompts(data, tokenizer, None, with_tasks=True, environment=MADE)
    first, row = found.prompts[0], splits["train"][0]
    assert (first.prompt_id, first.answer, first.problem) == (row["id"], row["answer"], row["problem"])
    assert tokenizer.decode(first.token_ids) == f"[user]{row['prompt']}[assistant]"
    assert first.gold == row["problem"] and found.tasks[first.prompt_id].columns["family"] == row["family"]
    assert training_golds(data, found, "environment").answers[first.prompt_id] == row["problem"]
    # What a resume compares: prompts, and how answers to them are graded.
    other = replace(first, problem=first.problem.replace('"stated"', '"tags"'))
    assert load_prompts(data, tokenizer, None, environment=MADE).digest != found.digest, "rewards see columns"
    bare = replace(found, tasks={})
    assert replace(bare, prompts=(other, *bare.prompts[1:])).digest != bare.digest == replace(bare).digest
    few = load_prompts(DataConfig(path="environment:heldout", limit=3), tokenizer, None, environment=MADE)
    assert [p.prompt_id for p in few.prompts] == [row["id"] for row in splits["heldout"][:3]]


def test_the_recipe_can_be_made():
    config = load_config(ROOT / "docs/recipes/reasoning-gym.yaml")
    environment = config.environment
    assert not config.used_teachers and environment is not None
    assert len(columns_of(environment, "train")) == environment.train
    assert len(columns_of(environment, "heldout")) == environment.heldout


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            Reply(fault=Fault.RAISED, error="environment.families.gcd: is wrong"),
            "^environment.families.gcd: is wrong$",
        ),
        (
            Reply(fault=Fault.RAISED, error="Traceback: no"),
            "environment.families.gcd: its problems cannot be made: Traceback: no",
        ),
        (
            Reply(fault=Fault.TIME, error="late"),
            r"families.gcd: 3 of its 81 problems were made within environment.seconds = 300.*\(environment.train",
        ),
        (Reply(fault=Fault.MEMORY, error="took"), "environment.families.gcd: its problems cannot be made: took"),
    ],
)
def test_what_goes_wrong_is_said_by_family(monkeypatch, reply, said):
    class Child:
        def __init__(self, limits, graders):
            self.replies = [Reply([[i, f"q{i}", "a"] for i in range(3)]), reply]

        def start(self, within):
            return True

        def ask(self, call, within):
            return self.replies.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(rows_module, "GradingChild", Child)
    rows_module._splits.cache_clear()
    with pytest.raises(DataError, match=said):
        columns_of(EnvironmentConfig(families={"gcd": {}}, train=60, heldout=21), "train")


def test_counts_follow_the_weights():
    config = EnvironmentConfig(families={"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 0.5}}, train=7)
    assert config.counts("train") == {"a": 3, "b": 3, "c": 1}
    for total in range(1, 30):
        counts = config.model_copy(update={"heldout": total}).counts("heldout")
        assert sum(counts.values()) == total and abs(counts["a"] - 0.4 * total) < 1


# --- what the configuration refuses -----------------------------------------------------------------------


def config(environment=None, verifier="environment", path="environment:train", heldout="environment:heldout"):
    return Config.model_validate(
        {
            "student": {"path": "s"},
            "teacher": {"path": "t"},
            "data": {"path": path},
            "environment": {"families": {"gcd": {}}} if environment is None else environment,
            "evaluation": {"verifier": verifier, "data": heldout and {"path": heldout}},
        }
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "environment:test"}, "data.path = 'environment:test': must be environment:train or"),
        ({"heldout": "environment:"}, "evaluation.data.path = 'environment:': must be"),
        ({"heldout": "h.jsonl"}, "evaluation.verifier = 'environment': grades problems of the environment alone, "
            "and evaluation.data.path = 'h.jsonl' is none"),
        ({"path": "t.jsonl"}, "and data.path = 't.jsonl' is none"),
        ({"verifier": "math"}, r"data.path = 'environment:train': needs evaluation.verifier = 'environment'"),
        ({"environment": {"families": {"countdown": {}}}}, "families.countdown: its scorer runs the answer as code "
            r"\(parse_expr of sympy, which is eval\).*environment.allow_unsafe = \[countdown\] takes that risk"),
        ({"environment": {"families": {"gcd": {}}, "allow_unsafe": ["gcd"]}}, "allow_unsafe = 'gcd': must be among "
            "binary_matrix, countdown"),
        ({"environment": {"families": {"composite": {}}}}, "families.composite: is a mixture of families"),
        ({"environment": {"families": {}}}, "at least 1 item"),
        ({"environment": {"families": {"gcd": {"settings": {"seed": 3}}}}}, "gcd.settings.seed: is set by"),
        ({"environment": {"families": {"gcd": {}}, "prompt": "Solve:"}}, "prompt = 'Solve:': must hold {question}"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_the_section_is_asked_for():
    with pytest.raises(ValueError, match=r"data.path = 'environment:train': needs the section env"):
        Config.model_validate(
            {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "environment:train"}}
        )


def test_problems_that_no_step_asks_are_named():
    asked = config(path="environment:train")
    assert unused_environment(asked.environment, "environment:train") is None
    assert "since data.path = 't.jsonl'" in unused_environment(asked.environment, "t.jsonl")
    assert unused_environment(None, "t.jsonl") is None


def test_what_can_be():
    assert config(heldout=None).environment is not None
    unsafe = {"families": {"countdown": {}, "gcd": {}}, "allow_unsafe": ["countdown"]}
    made = config(unsafe).environment
    assert made.first("countdown").unsafe and not made.first("gcd").unsafe


# --- curricula --------------------------------------------------------------------------------------------


LADDER = {
    "families": {"chain_sum": {}, "gcd": {"settings": {}}},
    "train": 12,
    "heldout": 7,
    "curriculum": {"levels": 3},
}


@pytest.fixture(scope="module")
def ladder():
    made = EnvironmentConfig(**LADDER)
    return {split: columns_of(made, split) for split in ("train", "heldout")}


def test_levels_are_those_of_the_librarys_curriculum(ladder):
    train, heldout = ladder["train"], ladder["heldout"]
    assert len(train) == 36 and len(heldout) == 7, "train for each level, heldout in all"
    assert [sum(r["level"] == level for r in heldout) for level in range(3)] == [3, 2, 2]
    assert len({*questions(train), *questions(heldout)}) == len({r["id"] for r in (*train, *heldout)}) == 43
    settings = {r["level"]: json.loads(r["problem"])["settings"] for r in train if r["family"] == "chain_sum"}
    assert {level: (s["max_terms"], s["max_digits"]) for level, s in settings.items()} == {
        0: (2, 1), 1: (3, 2), 2: (4, 3)
    }  # fmt: skip
    numbers = [max(map(int, re.findall(r"\d+", r["prompt"]))) for r in train if r["family"] == "chain_sum"]
    levels = [r["level"] for r in train if r["family"] == "chain_sum"]
    assert all(n < 10 ** (level + 1) for n, level in zip(numbers, levels, strict=True)) and max(numbers) > 99
    rows_module._splits.cache_clear()
    again = columns_of(EnvironmentConfig(**LADDER), "train")
    assert again == train


def test_prompts_of_a_level_stand_in_for_those_of_the_first(ladder):
    tokenizer, environment = make_tokenizer(), EnvironmentConfig(**LADDER)
    found = load_prompts(DataConfig(path="environment:train"), tokenizer, None, environment=environment)
    order = PromptOrder(found.prompts, 0, True)
    first = order.take(range(12))
    assert len({*first}) == 12 and {p.level for p in first} == {0}, "an epoch is the prompts of one level"
    assert order.take(range(5), {}) == first[:5]
    harder = order.take(range(12), {"gcd": 2})
    for before, after in zip(first, harder, strict=False):
        assert after.source == before.source and after.level == (2 if before.source == "gcd" else 0)
        assert (after == before) == (before.source == "chain_sum")
    assert len({p.prompt_id for p in harder}) == 12, "another one for each"
    few = DataConfig(path="environment:train", limit=2)
    with pytest.raises(DataError, match=r"environment.curriculum: .* has no problem of level . among the 2 of"):
        load_prompts(few, tokenizer, None, environment=environment)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"families": {"list_functions": {}}},
            "environment.families.list_functions: reasoning-gym .* no curriculum",
        ),
        ({"families": {"gcd": {"settings": {"max_value": 9}}}}, "gcd.settings.max_value: is moved by"),
        (
            {"curriculum": {"levels": 9}, "families": {"gcd": {}}},
            "curriculum.levels = 9: the curriculum of gcd has 4",
        ),
        ({"families": {"gdc": {}}}, "has no family of this name; did you mean gcd"),
        (
            {"families": {"survo": {}}},
            r"environment.curriculum: level . of survo cannot be made.*max_empty must be",
        ),
    ],
)
def test_what_has_no_such_levels_is_said(changes, said):
    rows_module._splits.cache_clear()
    with pytest.raises(DataError, match=said):
        columns_of(EnvironmentConfig(**{**LADDER, **changes}), "train")


def test_a_curriculum_needs_rewards():
    with pytest.raises(ValueError, match=r"environment.curriculum: needs objective.rl.weight > 0"):
        config({"families": {"gcd": {}}, "curriculum": {"levels": 2}})
