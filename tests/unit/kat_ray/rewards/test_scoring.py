"""Reward functions: what they are called with, what becomes of what they return, and which are refused."""

import re

import pytest

from kat_ray.errors import RewardError, UserError
from kat_ray.rewards.limits import Call, Fault, Outcome
from kat_ray.rewards.scoring import Answer
from kat_ray.rewards.task import Task
from tests.unit.kat_ray.rewards.functions import GOOD, TASKS, answers, ids_of, scorer, values

SIGNATURES = """
import asyncio
from fractions import Fraction
from numpy import float32, array

def trl(prompts, completions, completion_ids, answer, level, **kwargs):
    assert (prompts, completions, completion_ids) == (["1+1?"], ["2, so 2"], [[5, 6]])
    assert (answer, level, kwargs) == (["2"], [7], {})
    return [0.5]

def trl_few(completions):
    return (Fraction(1, 4),)

async def trl_async(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return array([completions[0].count(answer[0])])

class Judge:
    def __call__(self, prompts, completions, **kwargs):
        return [True]

judge = Judge()

def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, solution_str, ground_truth, extra_info) == ("d.jsonl", "2, so 2", "2", None)
    return {"score": float32(0.125), "acc": True}

def verl_number(data_source, solution_str, ground_truth, extra_info, **kwargs):
    return -3

def openrlhf(queries, prompts, labels, **kwargs):
    assert (queries, prompts, labels) == (["1+1?2, so 2"], ["1+1?"], ["2"])
    return {"rewards": [1.5], "scores": [1], "extra_logs": {}}
"""
GIVEN = {
    "trl": 0.5, "trl_few": 0.25, "trl_async": 2.0, "judge": 1.0, "verl": 0.125, "verl_number": -3.0,
    "openrlhf": 1.5,
}  # fmt: skip


def test_signatures_are_taken_as_they_are_and_several_are_weighed(file):
    weights = {file(SIGNATURES, name): 2.0**-i for i, name in enumerate(GIVEN)}
    with scorer(weights, memory_gib=4.0) as made:
        scored = made.score(answers("2, so 2"))
    reward = scored.rewards[0]
    assert (reward.error, dict(reward.parts)) == ("", GIVEN)
    # 0.5 + 0.25 / 2 + 2 / 4 + 1 / 8 + 0.125 / 16 - 3 / 32 + 1.5 / 64
    assert reward.value == 1.1875
    assert {n: scored.metrics[f"reward/part/{n}"] for n in GIVEN} == GIVEN
    assert (scored.metrics["reward/errors"], scored.metrics["reward/timeouts"]) == (0, 0)


CHATS = """
def trl(prompts, completions, answer, data_source, **kwargs):
    assert prompts == [[{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]]
    assert completions == [[{"role": "assistant", "content": "four"}]]
    assert (answer, data_source, sorted(kwargs)) == ([["4", "four"]], ["sums"], ["completion_ids", "extra_info"])
    return [1.0]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, ground_truth, extra_info) == ("sums", ["4", "four"], {"i": 3})
    return float(solution_str in ground_truth)
"""


def test_a_chat_and_its_columns(file):
    with scorer({file(CHATS, "trl"): 1.0, file(CHATS, "verl"): 1.0}) as made:
        assert made.score(answers("four", prompt="chat")).rewards[0].value == 2.0


BAD = {
    "raises": ("return [1 / (len(completions[0]) - 4)]", "ZeroDivisionError: division by zero"),
    "leaves": ("raise SystemExit(0)", "SystemExit: 0"),
    "text": ("return ['1.0']", "returned '1.0', which is no number"),
    "nan": ("return [float('nan')]", "returned nan, which is no finite number"),
    "infinite": ("return [float('-inf')]", "returned -inf, which is no finite number"),
    "huge": ("return [10 ** 400]", "OverflowError"),
    "nothing": ("pass", "returned None: a list with a number for each completion is needed"),
    "number": ("return 1.0", "returned 1.0: a list with a number"),
    "word": ("return 'yes'", "returned 'yes': a list with a number"),
    "few": ("return []", "returned 0 values for 1 completion: []"),
    "many": ("return [1, 2]", "returned 2 values for 1 completion: [1, 2]"),
    "cancelled": ("raise __import__('asyncio').CancelledError", "CancelledError"),
    "nested": ("return [[1.0]]", "returned [1.0], which is no number"),
}


def test_what_is_no_reward_is_counted_and_never_zero(file):
    code = "".join(f"def {name}(completions):\n    {body}\n" for name, (body, _) in BAD.items())
    with scorer({file(code, name): 1.0 for name in BAD}) as made:
        scored = made.score(answers("four"))
    reward = scored.rewards[0]
    assert reward.value is None and set(reward.parts.values()) == {None}
    assert reward.error == "raises: ZeroDivisionError: division by zero"
    assert scored.failures.first.startswith("the first error, of ")
    (frame,) = re.findall(r'File "(.*?)"', scored.failures.first)
    assert frame.endswith("my_rewards.py"), "a traceback begins where the user's code does"
    assert scored.metrics["reward/errors"] == 1 and not any("part" in name for name in scored.metrics)
    with scorer({file(code, name): 1.0 for name in BAD}) as made:
        arguments = TASKS["text"].arguments("four", ())
        replies = made._pool.ask([Call(name, arguments) for name in made._asked])
    for (name, (_, said)), reply in zip(BAD.items(), replies, strict=True):
        assert reply.fault is Fault.RAISED and said in reply.error, name


def test_values_of_verl_that_are_none(file):
    code = "def score(solution_str, **kw):\n    return {'acc': 1} if solution_str == 'a' else {'score': '1'}\n"
    with scorer({file(code): 1.0}) as made:
        errors = [r.error for r in made.score(answers("a", "b")).rewards.values()]
    assert errors == [
        "score: returned {'acc': 1}: there is no 'score' in it", "score: returned '1', which is no number"
    ]  # fmt: skip


TASKED = """
def sums(completions, **kwargs):
    return [float(len(c)) if c != "?" else None for c in completions]

def code(completions, data_source=None, **kwargs):
    return [None if data_source is None else 100.0]
"""


def test_none_on_purpose_is_not_graded_and_no_error(file):
    """Where it says nothing of any answer to a prompt, the other functions count, as TRL's for several tasks do."""
    both = {file(TASKED, "sums"): 1.0, file(TASKED, "code"): 1.0}
    given = answers("a", "?", "bc") | {3: Answer("chat", "abc", ()), 4: Answer("chat", "abcd", ())}
    with scorer(both, {**TASKS, "chat": Task("2+2?", "2+2?", None, {"data_source": ["x"]})}) as made:
        scored = made.score(given)
    assert values(scored) == [1.0, None, 2.0, 103.0, 104.0]
    assert not any(reward.error for reward in scored.rewards.values())
    assert (scored.metrics["reward/errors"], scored.metrics["reward/part/code"]) == (0, 100.0)
    with scorer({file(TASKED, "code"): 1.0}) as made:
        assert values(made.score(answers("a", "b"))) == [None, None]


def test_verdicts_and_formats_beside_functions(file):
    """A verifier without a gold answer, or without a verdict, leaves an answer ungraded."""
    functions = {"math": 1.0, "format": 0.5}
    with scorer(functions, pattern="^<b>.*</b>$") as made:
        given = {
            i: Answer("text", text, (), verdict)
            for i, (text, verdict) in enumerate(
                [
                    ("<b>\n2</b>", Outcome.RIGHT), ("2", Outcome.RIGHT), ("<b>3</b>", Outcome.WRONG),
                    ("<b>3</b>", Outcome.RAN_OUT), ("<b>3</b>", None),
                ]
            )
        }  # fmt: skip
        scored = made.score(given)
    assert values(scored) == [1.5, 1.0, 0.5, None, None]
    assert [r.error for r in scored.rewards.values()] == ["", "", "", "math: grading ran out", ""]
    assert scored.rewards[2].parts == {"math": 0.0, "format": 1.0}
    assert scored.metrics["reward/part/format"] == 0.8
    with scorer(functions, pattern="^<b>.*</b>$", threshold=1.0) as made:
        assert values(made.score(given)) == [1.0, 1.0, 0.0, None, None]
        ungraded = {i: Answer("text", "<b>2</b>", ()) for i in range(2)}
        assert values(made.score(ungraded)) == [None, None], "no gold answer is not a format alone"
    with scorer({"integer": 3.0}) as made:  # no child is started
        assert values(made.score({0: given[0], 1: given[2]})) == [3.0, 0.0]
        assert not made._pool._children


def test_too_many_errors_end_the_run_with_the_first_traceback(file):
    code = "def score(completions, **kw):\n    return [1.0 / len(completions[0])]\n"
    with scorer({file(code): 1.0}) as made:
        found = made.score(answers("", "a"))
        assert values(found) == [None, 1.0]
        found.failures.check(0.05)  # a single error ends no run
        made.score(answers("", "", *["a"] * 38)).failures.check(0.05)  # 2 of 40: 5 %
        with pytest.raises(UserError) as error:
            made.score(answers("", "", *["a"] * 37)).failures.check(0.05)
    said = str(error.value)
    assert said.startswith(
        "2 of 39 answers of a step could not be rewarded, more than reward.max_error_share = 0.05 allows; the "
        f"first error, of {file(code)}: Traceback (most recent call last):\n"
    )
    assert 'my_rewards.py", line 2, in score' in said and said.endswith("ZeroDivisionError: float division by zero")
    with pytest.raises(UserError, match="1 of 2 answers"):
        found.failures.check(0.0)


def test_a_verifier_that_runs_out_of_time_counts_among_the_errors(file):
    given = answers("2", verdict=Outcome.RAN_OUT) | {1: Answer("text", "2", (), Outcome.RIGHT)}
    with scorer({"math": 1.0}) as made:
        scored = made.score(given)
        assert values(scored) == [None, 1.0]
        scored.failures.check(0.05)  # a single one ends no run
        two = given | {2: Answer("text", "2", (), Outcome.NOT_REACHED)}
        with pytest.raises(RewardError, match=r"2 of 3 answers .* = 0.05 .* of math: grading ran out$"):
            made.score(two).failures.check(0.05)


def test_a_reward_that_no_group_could_hold_is_none(file):
    """Rewards of 1.7e308 and 1.6e308 have an infinite spread; so has a sum of such, whatever its parts are."""
    code = "def score(completions, **kw): return [float(completions[0])]\n"
    with scorer({file(code): 1.0}) as made:
        scored = made.score(answers("1.7e308", "-1000001", "1e6"))
        assert values(scored) == [None, None, 1e6] and scored.metrics["reward/errors"] == 2
        assert scored.rewards[0].error == "score: returned 1.7e+308, which is beyond 1,000,000 in size"
    with scorer({file(code): 10.0}) as made:
        scored = made.score(answers("5e5", "1"))
        assert values(scored) == [None, 10.0] and scored.metrics["reward/errors"] == 1
        assert scored.rewards[0].error == "the weighted sum is 5e+06, which is beyond 1,000,000 in size"
        assert scored.failures.first.startswith("the first error, of them all: the weighted sum is 5e+06")


TRAINED = """
def score(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("answer", completions)
    log_metric("length", len(completions[0]))
    assert not {"trainer_state", "log_extra", "log_metric"} & kwargs.keys()
    return [1.0 if trainer_state is None else 0.0]

def column(completions, log_extra):
    return [float(log_extra[0])]

def reads(completions, trainer_state):
    return [float(trainer_state.global_step)]
"""


def test_what_trl_s_trainer_gives_to_functions_that_ask_for_it(file):
    with scorer({file(TRAINED): 1.0}) as made:
        made.try_out("text", ids_of)
        assert values(made.score(answers("2"))) == [1.0]
    with scorer({file(TRAINED, "column"): 1.0}, {"text": Task("?", "?", None, {"log_extra": 7})}) as made:
        assert values(made.score(answers("2"))) == [7.0], "a column of the data goes before it"
    with (
        scorer({file(TRAINED, "reads"): 1.0}) as made,
        pytest.raises(UserError, match="has no attribute 'global_step'"),
    ):
        made.try_out("text", ids_of)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module\n" + GOOD, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit('no')\n" + GOOD, "SystemExit: no"),
        ("import os; os._exit(4)\n" + GOOD, "its process did not start: exit code 4"),
        ("score = 3\n", "score is int, not a function"),
        ("if False:\n    score = 3\n", "defines no 'score'"),
        ("def score(text): return 1.0\n", "score(text): a reward function takes `completions`"),
        ("def score(completions, solution_str): return 1.0\n", "a reward function takes `completions`"),
        (
            "def score(completions, level, hard): return [1.0]\n",
            "takes hard, and the data has no such column; what",
        ),
        ("def score(completions, **kw): return 1\n", "with the answer '2', and gave no reward: returned 1: a list"),
    ],
)
def test_a_function_that_cannot_work_is_refused_at_the_start(file, code, said):
    with scorer({file(code): 1.0}) as made, pytest.raises(UserError) as error:
        made.try_out("text", ids_of)
    assert str(error.value).startswith("reward.functions: ") and said in str(error.value)
    assert "my_rewards.py:score" in str(error.value)


def test_a_function_is_tried_on_the_gold_answer(file):
    code = "def score(completions, **kw): return [{'2': 1.0, '0': None}[completions[0]]]\n"
    with scorer({file(code): 1.0}, {**TASKS, "bare": Task("?", "?")}) as made:
        made.try_out("text", ids_of)
        made.try_out("bare", ids_of)
        with pytest.raises(UserError, match=r"(?s)on prompt chat with the answer \"\['4', 'four'\]\", .*TypeError"):
            made.try_out("chat", ids_of)


def test_files_beside_the_functions_can_be_imported_and_a_module_is_shared(file, tmp_path):
    (tmp_path / "beside.py").write_text("calls = []\n")
    code = "from beside import calls\n" + "".join(
        f"def {n}(completions):\n    calls.append(1)\n    return [len(calls)]\n" for n in ("a", "b")
    )
    with scorer({file(code, "a"): 1.0, file(code, "b"): 1.0}) as made:
        assert made.score(answers("x")).rewards[0].parts == {"a": 1.0, "b": 2.0}
