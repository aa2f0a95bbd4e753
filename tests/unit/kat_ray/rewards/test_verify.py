"""Answers read and graded; avg@k and pass@k by hand."""

import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_ray.errors import DataError
from kat_ray.rewards.math_grader import MathGrader
from kat_ray.rewards.verifiers import (
    avg_at_k,
    check_golds,
    evaluate_answers,
    extract_integer,
    gold_integer,
    grade,
    pass_at_k,
)
from kat_ray.types.records import Prompt


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("answer 42", "42"),
        ("Answer: -7.", "-7"),
        ("the answer is 5", "5"),
        ("answer = 5", "5"),
        ("answer\n12", "12"),
        ("answer 3, no: answer 4; check 5", "4"),  # the last `answer`, not the last integer
        ("2 + 3 makes 5", "5"),
        ("3-5", "5"),  # a subtraction
        ("(3)-4", "4"),
        ("3 - -5", "-5"),
        ("3 −4", "-4"),  # a typographic minus
        ("x=-5", "-5"),
        ("$-3$", "-3"),
        ("1,234,567", "1234567"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),  # no thousands separator: two numbers
        ("007", "7"),
        ("-0", "0"),
        ("answer 3.5", None),
        ("answer 4.0", None),
        ("12 or 3.5", "12"),
        ("1.2.3", None),
        ("v2", None),
        ("it is 7.", "7"),
        ("", None),
        ("answer", None),
        ("answering 3 questions leaves 4", "4"),
        ("x" * 9 + " 9" + "9" * 5000, "9" * 5001),  # longer than Python converts to int
    ],
)
def test_integer_is_read(text, integer):
    assert extract_integer(text) == integer


@given(st.integers(), st.sampled_from(["answer {}", "so 3 + 4, answer: {}.", "12 and {}", "= {:,}"]))
def test_any_integer_comes_back(number, sentence):
    assert extract_integer(sentence.format(number)) == str(number)


def test_integer_grading_is_exact():
    texts = ["answer 42", "answer 43", "42 or so", "answer 4 2", "none"]
    assert grade(texts, ["42"] * 5, "integer") == [True, False, True, False, False]
    assert grade(["answer 1234"], ["1,234"], "integer") == [True]


@pytest.mark.parametrize("gold", ["x", "3.5", "", "1 2", "\\frac{1}{2}"])
def test_gold_answers_that_are_no_integers(gold):
    with pytest.raises(DataError, match=r"is not an integer; use evaluation\.verifier = math"):
        gold_integer(gold)
    with pytest.raises(DataError, match="problem p7: the gold answer"):
        check_golds([Prompt("p7", (1,), gold)], "integer")
    check_golds([Prompt("p7", (1,), gold)], "math")


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),  # k = n: any right answer
        (4, 1, 1, 0.25),  # k = 1: the accuracy
        (5, 2, 3, 0.9),  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
        (6, 1, 2, 1 / 3),  # 1 - C(5, 2) / C(6, 2) = 1 - 10 / 15
        (3, 3, 2, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(nck):
    n, c, k = nck
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_means_nothing(n, c, k):
    with pytest.raises(ValueError, match="needs 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)


def test_avg_at_k_by_hand():
    assert avg_at_k([[True, False], [False, False], [True, True]]) == 0.5
    assert avg_at_k([]) == 0.0


def test_evaluation_by_hand():
    result = evaluate_answers(
        ["answer 1", "answer 2", "7", "no"],  # two problems, two answers each
        ["1", "8"],
        k=2,
        lengths=[2, 4, 6, 8],
        finished=[True, True, True, False],
        verifier="integer",
    )
    # problem 1: right, wrong; problem 2: wrong, wrong
    assert (result.avg_at_k, result.pass_at_k, result.k, result.problems) == (0.25, 0.5, 2, 2)
    assert (result.mean_length, result.truncated_share) == (5.0, 0.25)


def test_evaluation_needs_gold_answers_and_takes_no_problems():
    with pytest.raises(DataError, match="1 of 2 held-out problems have no gold answer"):
        evaluate_answers(["a", "b"], ["1", None], k=1, lengths=[1, 1], finished=[True] * 2, verifier="integer")
    with pytest.raises(DataError, match="problem x has no gold answer"):
        check_golds([Prompt("x", (1,))], "math")
    empty = evaluate_answers([], [], k=4, lengths=[], finished=[], verifier="integer")
    assert (empty.avg_at_k, empty.pass_at_k, empty.problems, empty.mean_length) == (0, 0, 0, 0)


MATH = [
    (r"so it is \boxed{\frac{1}{2}}", "0.5", True),
    ("it is $1/2$", r"\frac{1}{2}", True),
    (r"\boxed{1/3}", r"\frac{1}{2}", False),
    ("no idea", "1", False),
    (r"\boxed{\frac{", "1", False),  # cannot be parsed: wrong
    (r"$x = 3$", "3", True),
    (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", True),
    ("1,234", "1234", True),
    ("", "1", False),
]


def test_mathematics_is_graded_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(grade([t for t, _, _ in MATH], [g for _, g, _ in MATH], "math"))
    )
    thread.start()
    thread.join()
    assert found == [[right for _, _, right in MATH]]


def test_an_expression_that_never_ends_is_wrong_and_the_next_one_is_graded():
    with MathGrader(seconds=1.0) as grader:
        started = time.monotonic()
        assert not grader.grade("$9^{9^{9^{9}}}$", "1")
        assert time.monotonic() - started < 30
        assert grader.grade("$4$", "4")
