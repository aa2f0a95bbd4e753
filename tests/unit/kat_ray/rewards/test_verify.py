"""Answers read and graded; avg@k and pass@k by hand."""

import itertools
import json
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_ray.errors import DataError
from kat_ray.rewards.grader_pool import GraderPool
from kat_ray.rewards.integers import extract_integer, gold_integer
from kat_ray.rewards.limits import Fault, GradingLimits, Outcome, Reply, Verdicts
from kat_ray.rewards.math_grader import MathGrader, readable_part
from kat_ray.rewards.verifiers import avg_at_k, check_golds, evaluate_answers, grade, pass_at_k
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
        # What instruct models write.
        ("answer is: 42\nStep 7", "42"),
        ("Answer: **42**\nThat took 3 steps", "42"),
        ("**Answer:** $42$. Step 7", "42"),
        ("**Final answer**\n\n\\boxed{42}\n7", "42"),
        (r"\boxed{42} ... 7", "42"),
        (r"the final answer is $\boxed{42}$. Step 7", "42"),
        (r"answer is \(42\), not 7", "42"),
        (r"\boxed{\$32,\!348} or 7", "32348"),
        (r"\boxed{1{,}234} or 7", "1234"),
        (r"\boxed{x = 42\text{ cm}^\circ} and 9", "42"),
        (r"\boxed{42} and \boxed{", "42"),  # cut off in the second box
        ("first\n#### 42\nthen 7", "42"),
        ("#### 2. Solve\nanswer 5\n#### 3. Check 6", "5"),  # headings
        ("**42**\nStep 7", "42"),
        ("so **42** apples, **7** of them red", "7"),  # bold within a line: emphasis, not an answer
        ("Answer: $1,234", "1234"),
        ("answer 5 or \\boxed{6}", "6"),  # the last that is stated
        ("answer is 1/2", None),
        ("it is 1 / 2", None),
        ("answer 2^{10}", None),
        (r"\boxed{\frac{1}{2}} 7", None),
        (r"\boxed{x+1} 7", None),
        ("1/2 of 84 is 42", "42"),
        ("answer 62, for answer * 38 is too large", "62"),  # a product
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
    with GraderPool() as pool:
        assert grade(texts, ["42"] * 5, "integer", pool).right == [True, False, True, False, False]
        assert grade(["answer 1234"], ["1,234"], "integer", pool).right == [True]


@pytest.mark.parametrize("gold", ["x", "3.5", "", "1 2", "\\frac{1}{2}"])
def test_gold_answers_that_are_no_integers(gold):
    with pytest.raises(DataError, match=r"is not an integer; use evaluation\.verifier = math"):
        gold_integer(gold)
    with pytest.raises(DataError, match="problem p7: the gold answer"):
        check_golds([Prompt("p7", (1,), gold)], "integer")


def test_a_gold_answer_behind_a_mark_says_which_field_reads_it():
    with pytest.raises(
        DataError, match=r"'1 \+ 1 = 2.*\.\.\.' is not an integer; answer_after = '####' of its data"
    ):
        gold_integer("1 + 1 = 2\n" * 20 + "#### 2")


@pytest.mark.parametrize(("gold", "integer"), [("34.0", "34"), ("-7.00", "-7"), ("1,234", "1234"), (" 5 ", "5")])
def test_gold_answers_that_are_integers(gold, integer):
    assert gold_integer(gold) == integer


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


@pytest.fixture(scope="module")
def pool():
    with GraderPool(GradingLimits(processes=2, seconds=60.0, total_seconds=300.0)) as made:
        yield made


def test_mathematics_is_graded_outside_the_main_thread(pool):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(grade([t for t, _, _ in MATH], [g for _, g, _ in MATH], "math", pool))
    )
    thread.start()
    thread.join()
    assert found[0].right == [right for _, _, right in MATH]
    assert found[0].ran_out == 0


# Forms of gold answers of MATH, and what a model puts into its box.
GOLDS = [
    (r"\$18.90", r"\$18.90"), (r"\$36", "36"), (r"\$32,\!348", r"\$32,\!348"), ("$18.90", r"\$18.90"),
    ("(1,2)", "(1,2)"), ("12", "12"),
    (r"\frac{1}{2}", "0.5"), (r"$\frac{1}{2}$", r"\frac{1}{2}"), (r"\boxed{7}", "7"), (r"\[ 5 \]", "5"),
    (r"\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\(x^2\)", "x^2"), (r"10\%", r"10\%"), (r"\text{(A)}", r"\text{(A)}"), ("x^2+2x+1", "(x+1)^2"),
]  # fmt: skip


def test_gold_answers_equal_themselves(pool):
    golds = [gold for gold, _ in GOLDS]
    found = pool.grade([rf"so \boxed{{{box}}}" for _, box in GOLDS], golds)
    assert [gold for gold, right in zip(golds, found.right, strict=True) if not right] == []
    check_golds([Prompt(str(i), (1,), gold) for i, gold in enumerate(golds)], "math")


def test_a_gold_answer_that_is_in_a_sentence_is_found(pool):
    assert pool.grade([r"\boxed{5}", r"\boxed{6}"], ["It is $5$ metres."] * 2).right == [True, False]


def test_a_gold_answer_that_does_not_equal_itself_is_refused():
    problems = [Prompt("ok", (1,), "7"), Prompt("f:3", (2,), "$")]
    with pytest.raises(DataError, match=r"problem f:3: no answer could match the gold answer '\$': .*itself"):
        check_golds(problems, "math")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\\boxed{4} and " + "so we go on, " * 400, True),
        ("\\boxed{4} and " + "7 or 8 \\\\ " * 700, True),
        ("\\boxed{4} and " + "\\boxed{ " + "so " * 2000, True),  # the last box that is complete
        ("\\boxed{4} and " + "so " * 2000 + "\\boxed{5}", False),
        ("\\boxed{\\frac{8}{2}}" + " \\frac{1}{3}" * 500, True),
    ],
)
def test_an_answer_that_is_boxed_long_before_the_end_is_read(pool, text, right):
    assert len(text) > 4000
    assert pool.grade([text], ["4"]).right == [right]


def test_what_never_ends_is_wrong_and_the_next_one_is_graded():
    with MathGrader(GradingLimits(seconds=2.0)) as grader:
        assert grader.grade("$9^{9^{9^{9}}}$", "1") is Outcome.RAN_OUT
        assert grader.grade("$4$", "4") is Outcome.RIGHT


def test_what_takes_too_much_memory_is_wrong_and_the_next_one_is_graded():
    """Its million terms are written out to be compared."""
    with MathGrader(GradingLimits(seconds=120.0, memory_gib=0.25)) as grader:
        assert grader.grade("$(x+1)^{1000000}$", "1", within=240.0) is Outcome.RAN_OUT
        assert grader.grade("$4$", "4") is Outcome.RIGHT


def test_many_answers_that_hang_take_no_longer_than_a_step_may():
    limits = GradingLimits(processes=2, seconds=1.0, total_seconds=5.0)
    with GraderPool(limits) as pool:
        pool.grade(["$4$"] * 5, ["4"] * 5, within=120.0)  # both have started
        found = pool.grade(["$9^{9^{9^{9}}}$"] * 25, ["1"] * 25)
        assert found.ran_out == 25 and not any(found.right)
        assert Outcome.RAN_OUT in found.outcomes and Outcome.NOT_REACHED in found.outcomes
        assert pool.grade(["$4$"], ["4"], within=120.0).right == [True]


def test_an_evaluation_counts_what_ran_out():
    result = evaluate_answers(
        ["$9^{9^{9^{9}}}$", "$4$"], ["1", "4"], k=1, lengths=[1, 1], finished=[True, True], verifier="math",
        limits=GradingLimits(seconds=2.0), within=120.0,
    )  # fmt: skip
    assert (result.right, result.ran_out, result.errors) == ((0, 1), 1, 0)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.RAISED, Outcome.RAISED), (Fault.DIED, Outcome.RAISED), (Fault.TIME, Outcome.RAN_OUT),
        (Fault.MEMORY, Outcome.RAN_OUT), (Fault.NOT_REACHED, Outcome.NOT_REACHED),
    ],
)  # fmt: skip
def test_each_fault_is_called_what_it_is(fault, outcome):
    found = Verdicts.by([Reply(True), Reply(False), Reply(fault=fault, error="why")])
    assert found.outcomes == (Outcome.RIGHT, Outcome.WRONG, outcome) and found.values == [1.0, 0.0, None]
    assert (found.ran_out, found.raised) == ((0, ["why"]) if outcome is Outcome.RAISED else (1, []))


def test_an_evaluation_counts_grading_that_failed_apart_and_says_why(caplog):
    class Pool:
        def ask(self, calls, within=None, check=None):
            return [Reply(fault=Fault.RAISED, error="ValueError: bad scorer"), Reply(1.0)]

    result = evaluate_answers(
        ["a", "b"], ["{}", "{}"], k=1, lengths=[1, 1], finished=[True, True], verifier="environment", pool=Pool()
    )
    assert (result.right, result.ran_out, result.errors) == ((0, 1), 0, 1)
    (said,) = caplog.messages
    assert said == "1 of 2 answers could not be graded and count as wrong; the first: ValueError: bad scorer"


# A model writes what is read here. What looks at a part of a text again and again takes hours for these.
WORST = [
    "#### 5" + " " * 10**6 + "x", "#### " + "1" * 10**6 + "x", "#### 1" + ",111" * 250_000 + "x",
    "**5" + " " * 10**6, "**" + " " * 10**6 + "x", "answer " * 150_000, "answer" + " " * 10**6,
    r"\boxed{" * 150_000, r"\boxed" + " " * 10**6,
    r"\boxed{\boxed{x}" * 60_000, r"\boxed{" + r"\text{" * 150_000 + "}", r"\boxed{" + "^ " * 500_000 + "}",
    "1" * 10**6, "1," * 500_000, "-" * 10**6, "{," * 500_000, "<answer>" * 125_000, "<answer>" + "x" * 10**6,
    "answer is * * " * 70_000, "####" * 250_000, "\n" * 10**6, "$" * 10**6, "\\" * 10**6,
]  # fmt: skip


def test_no_text_is_looked_at_again_and_again():
    """In a process with a bound that is far from what a text takes which is read once."""
    code = (
        "import json, resource, sys\n"
        "from kat_ray.rewards.extraction import extract_answer\n"
        "from kat_ray.rewards.integers import extract_integer\n"
        "from kat_ray.rewards.math_grader import readable_part\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (300, 300))\n"
        "for text in json.load(sys.stdin):\n"
        "    print(json.dumps(text[:20]), flush=True)\n"
        "    extract_integer(text), readable_part(text)\n"
        "    for reading in ('tags', 'stated', 'first_line'): extract_answer(text, reading)\n"
        "print('all')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(WORST), capture_output=True, text=True)
    assert done.stdout.endswith("all\n"), f"took for ever: {done.stdout.splitlines()[-1:]} {done.stderr}"


def test_spaces_and_a_dot_may_follow_an_answer_behind_hashes():
    assert [extract_integer(f"#### 5{end}\nthen 7") for end in ("", " ", ".", " .", " . ", ". x")] == [
        *"55555",
        "7",
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("short", "short"),
        (r"\boxed{4}" + "x" * 5000, r"\boxed{4}" + "\n" + "x" * 4000),
        (r"\boxed{a\}b{c}}" + "y" * 4100, r"\boxed{a\}b{c}}" + "\n" + "y" * 4000),  # \} closes nothing
        (r"\boxed{1} \boxed{" + "y" * 5000, r"\boxed{1}" + "\n" + "y" * 4000),  # the second is open
        (r"\boxed{1} \boxed{" + "y" * 5000 + "}", r"\boxed{1}" + "\n" + "y" * 3999 + "}"),  # or too long
        (r"\boxed{\boxed{2}" + "z" * 4100, r"\boxed{2}" + "\n" + "z" * 4000),
    ],
)
def test_what_is_read_of_a_long_text_is_its_end_and_its_last_complete_box(text, part):
    assert readable_part(text) == part
