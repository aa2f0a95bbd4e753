"""Answers graded, and what a set of graded answers amounts to.

`integer` and `math` read the whole text of an answer. Mathematics is graded in a child process
(kat_ray.rewards.math_grader): math-verify's own time limit is a signal, which only a main thread can take, and some
expressions (9^9^9) would never end without one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kat_ray.errors import DataError
from kat_ray.types.records import Prompt

Verifier = Literal["integer", "math"]

# A number as people write it: a minus that is not a subtraction, thousands separated by commas, decimals.
_NUMBER = r"(?<![0-9A-Za-z_.])(?:(?<![)\]])[-−])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER_RE = re.compile(_NUMBER)
_ANSWER_RE = re.compile(rf"\banswer\b\s*(?:is\b|[:=])?\s*({_NUMBER})", re.IGNORECASE)


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: `k` answers to each of `problems` problems."""

    avg_at_k: float  # mean accuracy over all answers, 0 to 1
    pass_at_k: float  # share of problems with a right answer among k, 0 to 1
    k: int
    problems: int
    mean_length: float  # tokens of an answer, stop id included
    truncated_share: float  # answers that reached the token limit, 0 to 1
    right: tuple[int, ...] = ()  # right answers to each problem, of k


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean accuracy of a [problems][k] matrix; 0 where it is empty."""
    total = sum(len(row) for row in correct)
    return sum(sum(row) for row in correct) / total if total else 0.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k answers drawn without replacement from n, c of them right, hold a right one.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of arXiv 2107.03374.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: n = {n}, c = {c}, k = {k}: needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def extract_integer(text: str) -> str | None:
    """The integer after the last `answer`, or else the last integer of the text, in plain digits.

    `answer` may be followed by `is`, `:` or `=`. `1,234` is one number; `3-5` holds 3 and 5, `3 - -5` 3 and -5.
    A decimal (`4.0`) is no integer: after `answer` it makes the answer unreadable, elsewhere it is passed over.
    """
    if answers := _ANSWER_RE.findall(text):
        return _plain(answers[-1])
    numbers = [p for p in map(_plain, _NUMBER_RE.findall(text)) if p is not None]
    return numbers[-1] if numbers else None


def _plain(number: str) -> str | None:
    """Digits without separators, leading zeros, or a minus before zero; None for a decimal.

    Text, not int: Python refuses to convert very long digit strings, which a looping model does write.
    """
    if "." in number:
        return None
    digits = number.replace(",", "").lstrip("-−").lstrip("0") or "0"
    return f"-{digits}" if number[0] in "-−" and digits != "0" else digits


def gold_integer(answer: str) -> str:
    """A gold answer in plain digits; `DataError` where it is no integer."""
    found = _NUMBER_RE.fullmatch(answer.strip())
    if found is None or (plain := _plain(found.group())) is None:
        raise DataError(f"the gold answer {answer!r} is not an integer; use evaluation.verifier = math")
    return plain


def grade(texts: Sequence[str], golds: Sequence[str], verifier: Verifier) -> list[bool]:
    """Whether each text answers with its gold answer. What cannot be read is wrong."""
    assert len(texts) == len(golds), f"{len(texts)} texts, {len(golds)} gold answers"
    if verifier == "integer":
        return [extract_integer(text) == gold_integer(gold) for text, gold in zip(texts, golds, strict=True)]
    from kat_ray.rewards.math_grader import MathGrader

    with MathGrader() as grader:
        return [grader.grade(text, gold) for text, gold in zip(texts, golds, strict=True)]


def evaluate_answers(
    texts: Sequence[str],
    golds: Sequence[str | None],
    *,
    k: int,
    lengths: Sequence[int],
    finished: Sequence[bool],
    verifier: Verifier,
) -> EvalResult:
    """Grade k answers to each problem. `texts`, `lengths` (tokens) and `finished` hold problem after problem.

    `finished` is false for an answer that ended at the token limit.
    """
    assert len(texts) == len(lengths) == len(finished) == len(golds) * k, "k answers to each problem"
    given = [gold for gold in golds if gold is not None]
    if len(given) < len(golds):
        raise DataError(f"{len(golds) - len(given)} of {len(golds)} held-out problems have no gold answer")
    right = grade(texts, [gold for gold in given for _ in range(k)], verifier)
    correct = [right[i : i + k] for i in range(0, len(right), k)]
    passed = sum(pass_at_k(k, sum(row), k) for row in correct)
    return EvalResult(
        avg_at_k=avg_at_k(correct),
        pass_at_k=passed / max(1, len(correct)),
        k=k,
        problems=len(correct),
        mean_length=sum(lengths) / max(1, len(lengths)),
        truncated_share=sum(not f for f in finished) / max(1, len(finished)),
        right=tuple(sum(row) for row in correct),
    )


def check_golds(problems: Sequence[Prompt], verifier: str) -> None:
    """Refuse gold answers that no text could match; `DataError` names the problem."""
    for problem in problems:
        if problem.answer is None:
            raise DataError(f"problem {problem.prompt_id} has no gold answer")
        if verifier == "integer":
            try:
                gold_integer(problem.answer)
            except DataError as error:
                raise DataError(f"problem {problem.prompt_id}: {error}") from error
