"""The answer that a text gives: what each reading takes for it."""

import pytest

from kat_ray.rewards.extraction import extract_answer


@pytest.mark.parametrize(
    ("text", "stated", "tags"),
    [
        ("<answer>42</answer>", "42", "42"),
        ("<answer> 1 </answer> no: <Answer>2</ANSWER> so \\boxed{3}", "2", "2"),  # the last, before all else
        ("<answer>\n1 0\n0 1\n</answer>", "1 0\n0 1", "1 0\n0 1"),
        ("<answer>open <answer>7</answer>", "7", "7"),
        ("<answer></answer>", None, None),
        ("<answer> \n </answer> answer: 3", None, None),  # an empty answer is stated
        ("x \\boxed{1} y \\boxed{\\frac{1}{2}} is the answer", "\\frac{1}{2}", None),
        ("The answer is 7.\nStep 9", "7", None),
        ("Answer: **olleh**", "olleh", None),
        ("**Answer:** `a b`", "a b", None),
        ("the answer is: -3.5.", "-3.5", None),
        ("#### 12\nanswer = 13", "13", None),
        ("answer is 5. No, the answer is $6$", "6", None),
        ("I count.\n**42**\n\n", "42", None),
        ("an answer", "an answer", None),  # nothing is stated by it
        ("so 5\nthe unanswered: 7 remains", "the unanswered: 7 remains", None),
        ("", None, None),
        (" \n\t\n", None, None),
    ],
)
def test_readings(text, stated, tags):
    assert extract_answer(text, "stated") == stated
    assert extract_answer(text, "tags") == tags


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" 42\n\nQuestion: 3 + 4 =\nAnswer: 7", "42"),
        ("\n\n olleh \n", "olleh"),
        ("well\n<answer>8</answer>", "8"),
        ("", None),
    ],
)
def test_a_model_that_goes_on_has_answered_in_its_first_line(text, first):
    assert extract_answer(text, "first_line") == first


def test_a_long_loop_of_openings_is_read_at_once():
    """Time that grows with the square of a looping text would end the child that grades it."""
    assert extract_answer("<answer>" * 20_000, "tags") is None
    assert extract_answer("\\boxed{" * 20_000 + "\nx", "stated") == "x"
    assert extract_answer("answer is " * 20_000, "stated") is not None
